"""Reads the run folder of a training run, here to show whether the model learned. Needs neither torch nor the model.

    python read_run.py demo-output/_probe

Ends with 1 if the token accuracy did not rise from the first record to the last.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import probe

SHOWN = (
    "probe/text/loss",
    "probe/text/token_accuracy",
    "probe/attention/cross/entropy",
    "probe/audio_encoder/time_std",
    "probe/grad/norm",
)


def main() -> int:
    """Print some metrics of every record, and where everything is."""
    parser = argparse.ArgumentParser(description="Show what a run folder holds.")
    parser.add_argument("folder", type=Path, help="the run folder, or the output_dir that holds it")
    run = probe.load(parser.parse_args().folder)

    print(f"\nRun folder: {run.path.resolve()}")
    for file in sorted(path for path in run.path.rglob("*") if path.is_file()):
        print(f"  {file.relative_to(run.path)}  {file.stat().st_size / 1024:.1f} KiB")

    print("\nRead back from it:")
    print(f"  {'step':<30}" + "".join(f"{record.step:>10}" for record in run.records))
    for name in SHOWN:
        print(f"  {name:<30}" + "".join(_cell(record.metrics.get(name)) for record in run.records))

    print("\nIn Python:")
    print("  import probe")
    print(f"  run = probe.load({str(run.path)!r})")
    print("  run.records[-1].metrics                                   # every number of the last record, by name")
    print("  run.records[-1].not_measured                              # what is missing, and why")
    print("  steps, values = run.series('probe/text/token_accuracy')   # two NumPy arrays")

    steps, accuracy = run.series("probe/text/token_accuracy")
    rose = accuracy[-1] > accuracy[0]
    verdict = "rose" if rose else "DID NOT RISE"
    print(f"\nToken accuracy {verdict}: from {accuracy[0]:.1%} at step {steps[0]} to {accuracy[-1]:.1%} at step {steps[-1]}.")
    return 0 if rose else 1


def _cell(value: float | None) -> str:
    return f"{'–':>10}" if value is None else f"{value:>10.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
