"""The benchmark of the cost: its lockstep changes no training, its counts and intervals are right, and its page says what was found."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, WhisperConfig, WhisperForConditionalGeneration, set_seed

pytest.importorskip("greenlet", reason="the benchmark's turns are greenlets")

from benchmarks.overhead import __main__ as command
from benchmarks.overhead import contenders as field
from benchmarks.overhead import measuring
from benchmarks.overhead.__main__ import chosen
from benchmarks.overhead.competitors import COMPETITORS, ByHand, Companion
from benchmarks.overhead.contenders import Contender, Watched, contenders, plain
from benchmarks.overhead.counting import count, peak_mib
from benchmarks.overhead.entry import SEED, Entry, Setting, arguments, parameters_of
from benchmarks.overhead.lockstep import UnbalancedError
from benchmarks.overhead.measuring import Budget, groups, measure
from benchmarks.overhead.page import Beside, page, target_table
from benchmarks.overhead.pairing import least_pairs
from benchmarks.overhead.ratios import Pair, Ratio, cycle_ratio, median_ratio
from benchmarks.overhead.results import ModelResult, Results, Row, read, write
from benchmarks.overhead.subjects import SUBJECTS, Samples, Subject, collate
from benchmarks.overhead.targets import PAIRS, spread, targets
from benchmarks.units.targets import Target

OPTIONAL = ("wandb", "nnsight", "torchlens")
BY_NAME = {contender.name: contender for contender in [plain(), *contenders()]}


def build(attention: str, *, random: bool = True) -> nn.Module:
    """A Whisper, by default with dropout and layerdrop, which draw from the global generators."""
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=64,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        dropout=0.2 * random,
        encoder_layerdrop=0.3 * random,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        attn_implementation=attention,
    )
    return WhisperForConditionalGeneration(config)


def sample(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(8, 40, generator=generator), "labels": torch.randint(2, 60, (6,), generator=generator)}


SUBJECT = Subject("toy", "a toy", build, sample, (2, 2), 1.0, (3, 1), short=True, small=True)
QUIET = replace(SUBJECT, build=partial(build, random=False))
TURNS: list[str] = []


class Observed:
    """Notes each training step and its loss; mixed into the Trainers of contenders."""

    losses: list[float]
    called: str = ""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.losses = [*getattr(self, "losses", []), loss.item()]
        TURNS.append(self.called)
        return loss


SETTING = Setting(SUBJECT, "cpu", Observed)


class StopsAt(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def uninterrupted(subject: Subject, attention: str, steps: int, folder: Path) -> Trainer:
    """Train alone for so many steps, nothing taking turns."""
    model = subject.model(seed=SEED, attention=attention)
    trainer = type("Alone", (Observed, Trainer), {})(
        model=model,
        args=arguments(SETTING, str(folder)),
        train_dataset=Samples(subject, seed=SEED),
        data_collator=collate,
        callbacks=[StopsAt(steps)],
    )
    set_seed(SEED)
    trainer.train()
    return trainer


@contextmanager
def entered(*names: str, subject: Subject = SUBJECT) -> Iterator[dict[str, Entry]]:
    """Contenders that have begun; their training ends with the context."""
    entries: dict[str, Entry] = {}
    try:
        for name in names:
            entries[name] = Entry(BY_NAME[name], replace(SETTING, subject=subject))
            entries[name].trainer.called = name
            entries[name].start()
        yield entries
    finally:
        for entry in entries.values():
            entry.close()


def assert_as_alone(entry: Entry, folder: Path, subject: Subject = SUBJECT) -> None:
    alone = uninterrupted(subject, entry.contender.attention, len(entry.trainer.losses), folder)
    assert entry.trainer.losses == alone.losses
    assert len(set(alone.losses)) == len(alone.losses)
    for (name, mine), theirs in zip(entry.trainer.model.state_dict().items(), alone.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_turns_change_no_training(tmp_path: Path) -> None:
    """In random turns every contender's losses and weights are those of the same training alone, bit by bit, and turns are kept."""
    TURNS.clear()
    rng, order = random.Random(0), []
    names = ["plain", "idle", "sampled", "passes", "every-10", "only statistics", "returned", "by-hand", "underflow"]
    with entered(*names) as entries:
        for _ in range(2):
            rng.shuffle(names)
            for name in names:
                took = entries[name].turn()
                assert took > 0
                assert getattr(entries[name].trainer, "kept", None) is None  # outputs are let go at the end of a step
                order.append(name)
        assert order == TURNS
        assert all(not entry.companion.troubles() for entry in entries.values())
    for entry in entries.values():
        assert entry.runner.steps == len(entry.trainer.losses) == 3  # the last one when it was told to end
        if isinstance(entry.companion, Watched | ByHand):
            assert not any(module._forward_hooks for module in entry.trainer.model.modules())
    for name in ("plain", "returned", "sampled", "passes"):
        assert_as_alone(entries[name], tmp_path / name)
    same = entries["plain"].trainer.losses
    assert all(entry.trainer.losses == same for name, entry in entries.items() if name != "returned")


@pytest.mark.parametrize("name", OPTIONAL)
def test_turns_of_optional_contenders_change_no_training(name: str, tmp_path: Path) -> None:
    """The same beside each tool that is installed on request only; torch's functions are as before it.

    TorchLens seeds torch's generator anew in each forward, so that dropout differs: it is shown on a model without.
    """
    pytest.importorskip(name)
    subject = QUIET if name == "torchlens" else SUBJECT
    relu = torch.relu
    with entered("plain", name, subject=subject) as entries:
        for _ in range(2):
            entries[name].turn()
            assert torch.relu is relu
            assert all(getattr(entries[name].companion, kept, None) is None for kept in ("cache", "recording"))
            entries["plain"].turn()
    assert torch.relu is relu
    assert_as_alone(entries["plain"], tmp_path / "plain", subject)
    assert_as_alone(entries[name], tmp_path / name, subject)


def test_a_mode_left_behind_is_an_error() -> None:
    """A step that leaves gradients off is told, for the next contender would train without."""

    class Leaves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.set_grad_enabled(state.global_step != 1)

    class Leaving(Companion):
        def callbacks(self) -> list[TrainerCallback]:
            return [Leaves()]

    entry = Entry(Contender("leaving", "", "", Leaving), SETTING)
    try:
        entry.start()
        with pytest.raises(UnbalancedError, match="left"):
            entry.turn()
    finally:
        torch.set_grad_enabled(True)
        entry.close()


def test_training_that_ends_by_itself_is_an_error() -> None:
    """A Trainer that stops early is told, not timed as if it trained."""

    class Stopping(Companion):
        def callbacks(self) -> list[TrainerCallback]:
            return [StopsAt(2)]

    entry = Entry(Contender("stopping", "", "", Stopping), SETTING)
    entry.start()
    entry.turn()
    with pytest.raises(RuntimeError, match="ended before"):
        entry.turn()
    entry.close()


def test_a_model_is_measured() -> None:
    """Every installed contender has a row with its pairs; what an idle probe adds is nothing; one that cannot run is named."""

    def broken() -> Companion:
        raise ImportError("no module of that name\nand a long story")

    class Breaking(Companion):
        def before(self) -> None:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 5:
                raise ValueError("not this step")

    asked = [BY_NAME[name] for name in ("idle", "sampled", "only statistics", "only attention rows", "every-10", "returned", "by-hand")]
    failing = [Contender("broken", "broken", "", broken), Contender("breaking", "breaking", "", Breaking, often=True)]
    said: list[str] = []
    [found] = measure(QUIET, [*asked, *failing], Budget(pairs=(3, 1), seconds=0, memory=1e9), device="cpu", say=said.append)
    rows = {row.name: row for row in found.rows}
    assert [row.name for row in found.rows] == [contender.name for contender in [*asked, *failing]]
    assert rows["broken"].error == "ImportError: no module of that name"
    assert rows["breaking"].error == "ValueError: not this step"
    assert {name: rows[name].error for name in rows if not name.startswith("brea") and name != "broken"} == {c.name: "" for c in asked}
    assert rows["idle"].ratio is not None and rows["idle"].ratio.pairs == 3
    assert (rows["idle"].kernels, rows["idle"].views, rows["idle"].syncs, rows["idle"].peak_mib) == (0, 0, 0, 0)
    assert rows["sampled"].kernels > rows["only statistics"].kernels > 0
    assert rows["only attention rows"].kernels > rows["only statistics"].kernels
    assert rows["returned"].peak_mib > 0
    assert rows["by-hand"].syncs >= 5 * 4
    assert found.kernels > 100 and found.peak_mib > 0.01 and found.sites > 4 and found.batch == "(2, 8, 40) and (2, 6)"
    assert found.own_pct is not None and 0 < found.own_pct < 100 and found.own_records == 4
    assert len(said) == 1


def test_every_group_is_handed_over_when_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is ended early has the rows it got to; what the plain step does is counted once."""
    counted: list[Any] = []
    monkeypatch.setattr(measuring, "count", lambda step: counted.append(step) or count(step))
    few = Budget(pairs=(1, 1), seconds=0, memory=2 * 12 * parameters_of(QUIET))
    first, second = measure(QUIET, [BY_NAME["idle"], BY_NAME["by-hand"]], few, device="cpu", say=lambda line: None)
    assert [row.name for row in first.rows] == ["idle"] and [row.name for row in second.rows] == ["idle", "by-hand"]
    assert all(row.ratio is not None for row in second.rows)
    assert (first.kernels, first.peak_mib) == (second.kernels, second.peak_mib)
    assert len(counted) == 3  # the plain step, and each contender's


def test_counts_of_a_step() -> None:
    """Operations that launch work, views and reads are told apart; a mask as an index is a read."""
    x = torch.randn(4, 4)

    def step() -> None:
        (x + 1).t().mul_(2)
        x.sum().item()
        x.tolist()
        _ = x[x > 0]

    counts = count(step)
    # add, mul_, sum, gt and index launch work; so does reading a value
    assert (counts.kernels, counts.views, counts.syncs) == (6, 1, 3)


def test_the_peak_of_a_step() -> None:
    """The highest level above the beginning, what was let go in between left out."""

    def step() -> Tensor:
        torch.ones(1 << 20)  # 4 MiB, let go
        return torch.ones(1 << 19)

    assert peak_mib(step) == pytest.approx(4, abs=0.1)


def test_ratios_are_medians_of_pairs() -> None:
    """The figure is the median of paired ratios; its interval holds it and shrinks with more pairs."""
    rng = random.Random(5)

    def pairs(number: int) -> list[Pair]:
        drift = [rng.uniform(1, 9) for _ in range(number)]
        return [Pair(i, d * 1.1 * rng.gauss(1, 0.01), d) for i, d in enumerate(drift)]

    few, many = median_ratio(pairs(15)), median_ratio(pairs(400))
    assert many.low < 1.1 < many.high and many.value == pytest.approx(1.1, abs=0.005)
    assert many.high - many.low < (few.high - few.low) / 2
    assert median_ratio([Pair(1, 2.0, 1.0)]) == Ratio(2.0, 2.0, 2.0, 1)


def test_a_cycle_is_weighted_by_its_steps() -> None:
    """One sampled step in ten, the one after it, and eight others; a kind that was not met leaves its steps to the others."""
    pairs = [Pair(step, {0: 3.0, 1: 2.0}.get(step % 10, 1.0), 1.0) for step in range(2, 42)]
    assert cycle_ratio(pairs, every=10).value == pytest.approx((3 + 2 + 8) / 10)
    assert cycle_ratio([pair for pair in pairs if pair.step % 10 > 1], every=10).value == 1.0


def test_groups_fit_and_keep_apart() -> None:
    """No more copies at once than there is memory for; what changes the process comes last and alone."""
    asked = [BY_NAME[name] for name in ("wandb", "idle", "sampled", "passes", "returned")]
    assert [[each.name for each in group] for group in groups(asked, at_most=3)] == [["idle", "sampled"], ["passes", "returned"], ["wandb"]]
    assert [len(group) for group in groups(asked[:1], at_most=1)] == [1]


def test_idle_steps_have_the_pairs_they_need() -> None:
    """At least 200 pairs of idle steps on a model of short steps, three cycles of a cadence, and a few of all else."""
    assert least_pairs(BY_NAME["idle"], (2000, 12)) == 2000
    assert least_pairs(BY_NAME["every-100"], (2000, 12)) > 300  # three whole cycles
    assert least_pairs(BY_NAME["returned"], (24, 3)) == 3
    assert least_pairs(BY_NAME["returned"], (2, 3)) == 2
    assert [subject.name for subject in SUBJECTS if subject.short and subject.pairs[0] >= PAIRS]


def test_every_contender_is_measured_with_every_model() -> None:
    """But for those that need hundreds of pairs, passes where there is no audio, and a model that is there for its batch alone."""
    everything = set(BY_NAME) - {"plain"}
    long = everything - {"again", "every-10", "every-100"}
    assert {each.name for each in chosen([], SUBJECT)} == everything
    assert {each.name for each in chosen([], replace(SUBJECT, short=False))} == long
    assert {each.name for each in chosen(["idle", "passes"], replace(SUBJECT, audio=False))} == {"idle"}
    assert {each.name for each in chosen(["idle", "wandb"], replace(SUBJECT, only=("idle", "sampled")))} == {"idle"}
    measured = {subject.name: {each.name for each in chosen([], subject)} for subject in SUBJECTS}
    assert measured["tiny"] == measured["base"] == measured["small"] == measured["qwen2_audio"] == long
    assert (measured["llama"], measured["short"]) == (long - {"passes"}, everything - {"passes"})
    assert measured["tiny-8"] == {"idle", "sampled", "passes", "returned", "by-hand"}


def test_every_observer_is_in_one_feature() -> None:
    """The rows "only ..." leave no part of the probe out, so that none is measured nowhere."""
    with entered("sampled") as entries:
        session = entries["sampled"].companion.probe._session()
        observers = {observer.name for observer in session.observation._observers}
    listed = [part for parts in field.FEATURES.values() for part in parts]
    assert sorted(listed) == sorted(observers - {"counterfactual"})


def row(name: str, value: float, *, low: float = 0.0, high: float = 0.0, pairs: int = 20, **counts: Any) -> Row:
    return Row(name, f"the {name}", "numbers", Ratio(value, low or value - 0.001, high or value + 0.001, pairs), 100.0, **counts)


def results(*rows: Row, device: str = "cpu") -> Results:
    model = ModelResult(
        "small", "Whisper | small", "(1, 80, 3000)", 10**6, "float32", 10, 90.0, 700, 300, 9, 50.0, list(rows), 4.4, 4, True
    )
    return Results("2026-01-01", device, "a machine", {"torch": "2"}, 3.0, 0.1, [model])


def verdicts(*rows: Row, device: str = "cpu") -> dict[str, bool | None]:
    return {target.target: target.met for target in targets(results(*rows, device=device))}


def pick(found: dict[str, bool | None], start: str) -> list[bool | None]:
    return [met for target, met in found.items() if target.startswith(start)]


@pytest.mark.parametrize(("low", "high", "pairs", "met"), [(0.999, 1.001, 200, [True, True]), (0.995, 1.005, 300, [True, False])])
def test_idle_targets(low: float, high: float, pairs: int, met: list[bool]) -> None:
    """The interval decides, not the median."""
    found = verdicts(row("idle", 1.0, low=low, high=high, pairs=pairs))
    assert pick(found, "an unsampled step: time") == met
    assert pick(verdicts(row("idle", 1.0, low=0.98, high=1.0, pairs=200)), "an unsampled step: time") == [False, False]
    assert pick(verdicts(row("idle", 1.0, low=low, high=high, pairs=199)), "an unsampled step: time") == [None, None]


def test_targets_of_sampled_steps() -> None:
    """Each bound met and missed by the figure beside it; what was not measured is neither."""
    good = verdicts(row("idle", 1.0), row("sampled", 1.04, peak_mib=60.0), row("passes", 1.9), row("only statistics", 1.01, kernels=60))
    bad = verdicts(
        row("idle", 1.0, kernels=1, peak_mib=0.1),
        row("sampled", 1.12, peak_mib=65.0),
        row("passes", 2.4),
        row("only statistics", 1.01, kernels=61),
        row("only attention rows", 1.08),
    )
    starts = [
        "an unsampled step: tensor",
        "an unsampled step: extra",
        "a sampled step, stat",
        "a sampled step with everything on, Whisper-small-sized, CPU",
    ]
    starts += ["the same at the default", "counterfactual", "a sampled step with everything on: extra"]
    assert [pick(good, start) for start in starts] == [[True]] * len(starts)
    assert [pick(bad, start) for start in starts] == [[False]] * len(starts)
    assert pick(good, "a sampled step: sync") == pick(good, "a sampled step with everything on, Whisper-small-sized, CUDA") == [None]
    cuda = verdicts(row("sampled", 1.04, syncs=1), device="cuda")
    assert pick(cuda, "a sampled step: sync") == [False]
    assert pick(cuda, "a sampled step with everything on, Whisper-small-sized, CUDA") == [True]
    assert set(verdicts().values()) == {None}


def test_an_interval_that_holds_the_bound_decides_nothing() -> None:
    """Neither met nor missed: the page says so, with the figure of the probe's own meter (4.4 %: 1.046, 1.0005 at every 100th step)."""
    wide = results(row("sampled", 1.04, low=0.9, high=1.2), row("passes", 2.0, low=1.9, high=2.1))
    found = {target.target: target for target in targets(wide)}
    small = next(target for name, target in found.items() if name.startswith("a sampled step with everything on, Whisper-small-sized, CPU"))
    rare = next(target for name, target in found.items() if name.startswith("the same at the default"))
    passes = next(target for name, target in found.items() if name.startswith("counterfactual"))
    assert (small.met, rare.met, passes.met) == (None, None, None)
    assert "by the probe's own meter 1.046" in small.why and "by the probe's own meter 1.0005" in rare.why
    assert rare.measured == "1.0004 [0.9990, 1.0020]" and passes.measured == "1.0019 [1.0014, 1.0024]"
    table = target_table([small, passes])
    assert table.count("undecided, the interval holds the bound") == 2 and "not measured" not in table


def test_what_happens_rarely_is_spread() -> None:
    """A step of 1.05 every hundredth costs 1.0005; passes are counted from the sampled step that they come on top of."""
    assert spread(Ratio(1.05, 1, 1, 1), 100) == pytest.approx(1.0005)
    assert spread(Ratio(2.05, 1, 1, 1), 500, less=1.05) == pytest.approx(1.002)


def test_the_page_tells_all() -> None:
    """Figures, missed targets with what costs most, tools that did not run with their error, and the other device's absence."""
    broken = Row("nnsight", "nnsight", "tensors", error="ImportError: no | such module")
    run = results(row("sampled", 1.1), row("only attention rows", 1.08), row("passes", 2.0), broken)
    text = page([run], others=[Beside("the other bench", [Target("bytes", "≤ 1", "2", False, "it is wide")])], plots=["x.svg"])
    assert "does not run: ImportError: no \\| such module" in text
    assert "| bytes | ≤ 1 | 2 | **missed**, because it is wide |" in text
    assert 'The rows from "bytes" on are of the other bench.' in text
    assert "**missed**, because alone and on Whisper \\| small these cost most: numbers 8.0 %" in text
    assert "1.1000 [1.0990, 1.1010]" in text and "| 9.1 [9.0, 9.2] | 4.4 (4 steps) | 1.0100 | 1.0010 | 1.0018 |" in text
    assert "a model was not measured: no memory" in page([replace(run, failed={"a model": "no memory"})])
    assert "No CUDA device" in text and "](x.svg)" in text
    assert "No CUDA device" not in page([results(row("sampled", 1.1), device="cuda")])
    assert "How it is measured" in page([])
    assert target_table([Target("a", "b", "", None)]).endswith("| a | b |  | not measured |")


def test_results_are_read_as_written(tmp_path: Path) -> None:
    """JSON keeps every field."""
    run = replace(results(row("idle", 1.0), Row("x", "y", "z", error="no")), failed={"a model": "no memory"})
    write(run, tmp_path / "folder" / "run.json")
    assert read(tmp_path / "folder" / "run.json") == run


def test_the_command_writes_results_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and page of what was measured lie there, and a model that fails is named and loses no other's figures."""

    def unbuildable(attention: str) -> nn.Module:
        raise MemoryError("too wide")

    monkeypatch.setattr(command, "SUBJECTS", (QUIET, replace(QUIET, name="wide", title="a wide one", build=unbuildable)))
    flags = ["--contenders", "idle", "--pairs", "2", "--minutes", "0", "--memory", "1"]
    command.main([*flags, "--results", str(tmp_path / "overhead-x-cpu.json"), "--docs", str(tmp_path)])
    run = read(tmp_path / "overhead-x-cpu.json")
    assert [model.name for model in run.models] == ["toy"] and run.failed == {"a wide one": "MemoryError: too wide"}
    text = (tmp_path / "overhead.md").read_text(encoding="utf-8")
    assert "a wide one was not measured: MemoryError: too wide" in text and "the probe, unsampled step" in text


def test_memory_of_the_model_before_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many copies of a model there is room for is asked when none of another model's is left."""
    made: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []

    def noting(attention: str) -> nn.Module:
        model = build(attention, random=False)
        if next(model.parameters()).device.type == "cpu":
            made.append(weakref.ref(model))
        return model

    def counting(device: str) -> float:
        alive.append(sum(model() is not None for model in made))
        return 1.0

    monkeypatch.setattr(command, "SUBJECTS", (replace(QUIET, build=noting), replace(QUIET, name="second", title="a second one")))
    monkeypatch.setattr(command, "_memory_gib", counting)
    flags = ["--contenders", "idle", "--pairs", "1", "--minutes", "0"]
    command.main([*flags, "--results", str(tmp_path / "overhead-x-cpu.json"), "--docs", str(tmp_path)])
    assert len(made) == 2 and alive == [0, 0]


def test_results_of_other_models_stand_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models measured before stay, in the order of the subjects; what is measured anew takes the place of what was."""
    wide = replace(QUIET, name="wide", title="a wide one")
    monkeypatch.setattr(command, "SUBJECTS", (replace(QUIET, name="first"), QUIET, wide))
    [old] = results(row("idle", 1.0)).models
    before = replace(
        results(), models=[replace(old, name="wide", probe="0.0.9"), replace(old, name="toy")], failed={"a toy": "no memory", "else": "no"}
    )
    write(before, tmp_path / "overhead-x-cpu.json")
    found = str(tmp_path / "overhead-x-cpu.json")
    flags = ["--models", "toy", "--contenders", "idle", "--pairs", "2", "--minutes", "0", "--memory", "1"]
    command.main([*flags, "--results", found, "--add", found, "--docs", str(tmp_path)])
    run = read(tmp_path / "overhead-x-cpu.json")
    assert [(model.name, model.title) for model in run.models] == [("toy", "a toy"), ("wide", "Whisper | small")]
    assert run.failed == {"else": "no"} and run.minutes > before.minutes
    assert [model.probe for model in run.models] == [run.versions["probe"], "0.0.9"]
    text = (tmp_path / "overhead.md").read_text(encoding="utf-8")
    assert text.count("Measured with probe") == text.count("Measured with probe 0.0.9.") == 1


def test_the_plot_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    """It is drawn from the results alone, on no background."""
    pytest.importorskip("matplotlib")
    from benchmarks.overhead.plot import draw

    for name in ("a", "b"):
        draw(results(row("idle", 1.0), row("sampled", 1.3)), tmp_path / name)
    first = (tmp_path / "a").read_text(encoding="utf-8")
    assert first == (tmp_path / "b").read_text(encoding="utf-8")
    assert first.count("<svg") == 1 and "#ffffff" not in first


def test_competitors_say_what_they_give() -> None:
    """No row of the table without a word on what one has of it."""
    assert all(row["gives"] and row["title"] for row in COMPETITORS)
    make: list[Callable[[], Companion]] = [row["companion"] for row in COMPETITORS]
    assert len(set(make)) == len(make)
