"""The page that documents every finding, generated from the rules: what it means, how it is decided, what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from probe.findings.rule import WINDOW, Rule

_GROUPS = {
    "setup": "Setup",
    "modes": "Modes",
    "gradients": "Gradients",
    "gradient_size": "Gradients",
    "updates": "Updates",
    "loss": "Loss",
    "activations": "Activations",
    "inputs": "Rows and ids",
    "labels": "Labels",
    "audio": "Audio and text",
    "clips": "Audio clips",
    "conditioning": "The way of the audio",
    "reference": "The reference",
    "heads": "Predictions",
    "attention": "Attention and branches",
}

_ABOUT = f"""# Findings

Generated from `probe/findings/rules/` (`python -m probe.findings > docs/findings.md`); do not edit.

A finding is a diagnosis: what is, or may be, wrong with the run, since when, by which numbers, and what to do next. Each is decided
by one small function over the records of the sampled steps (the newest {WINDOW} of them) and the facts of the run; it reads nothing
else, and runs no tensor operation. What could not be measured decides nothing: a rule without its numbers is silent, and an open
finding stays as it is.

## Severities

| severity | meaning |
|---|---|
| critical | the result will be wrong, or wasted, unless the training is stopped |
| warning | probably so; look at it |
| info | worth knowing; often meant |

## Life

A finding is known by its code and, where there is one, its site. It is told when it *opens*, when its severity *changes*, and when
it *closes*: after two sampled steps in a row in which its rule had its numbers and found nothing. Between that it stands as one
line in the verification section, in `p.last.findings`, and in the metrics `probe/findings/critical`, `probe/findings/warning` and
`probe/findings/info` (how many are open). All events are lines of `findings.jsonl` in the run folder; `probe.load(folder).findings`
is their history.

```{{code-block}} python
def tell(finding):
    print(finding.severity, finding.code, finding.state, finding.message, finding.advice)

p = probe.attach(model, on_finding=tell, stop_on="critical")
```

* `on_finding` is called on rank 0 with every event, a `probe.records.Finding`. An error in it is said once and switches it off;
  training goes on.
* `stop_on="critical"` (or `"warning"`) ends the training when such a finding opens, or becomes that severe, on every rank at the
  same step, as `control.should_training_stop` does: the model is as it is then, and nothing is raised. Without it findings change
  nothing about the training.

## How the bounds were chosen

Each bound has its reason, which stands with the finding: arithmetic, the resolution of a dtype, the definition of the number, or
what freshly initialised models show. Where a number may be odd for one step by chance, several in a row are asked for. They were
written down after the list of [faults](faults.md) was split into a part to set bounds on and a part to test on; that page says how
often faults are found, and what is said of healthy runs. What a model does on purpose cannot always be told from a mistake: where
the advice says "if it is not meant", that is all it says.
"""


def markdown_page(rules: Sequence[Rule]) -> str:
    """Return the whole of ``docs/findings.md``; rules of one file stand together, in the order given."""
    groups: dict[str, list[Rule]] = {}
    for rule in rules:
        groups.setdefault(_group(rule), []).append(rule)
    lines = [_ABOUT, "## All of them", "", "| finding | severity | meaning |", "|---|---|---|"]
    for each in groups.values():
        lines += [f"| [{rule.code}](#{rule.code}) | {rule.severity} | {_cell(rule.meaning)} |" for rule in each]
    for name, each in groups.items():
        lines += ["", f"## {name}"]
        for rule in each:
            lines += ["", *_rule(rule)]
    return "\n".join(lines) + "\n"


def _rule(rule: Rule) -> list[str]:
    decided = [f"**How it is decided.** {_plain(rule.threshold)}", ""] if rule.threshold else []
    return [
        f"### {rule.code}",
        "",
        f"*{rule.severity}.* {_plain(rule.meaning)}",
        "",
        *decided,
        f"**What to do next.** {_plain(rule.advice)}",
    ]


def _group(rule: Rule) -> str:
    name = rule.check.__module__.rpartition(".")[2]
    return _GROUPS.get(name, name.capitalize())


def _plain(text: str) -> str:
    """Return prose in which Markdown sees no emphasis: names with underscores and asterisks stay as they are written."""
    parts = text.split("`")
    parts[::2] = [part.replace("*", r"\*").replace("_", r"\_").replace("<", r"\<") for part in parts[::2]]
    return "`".join(parts)


def _cell(text: str) -> str:
    return _plain(text).replace("|", r"\|")
