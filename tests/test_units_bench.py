"""The unit benchmark: what it measures is what it says, each judgement can fail, and the page of scaling follows from figures."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("the benchmarks are run with the newest transformers", allow_module_level=True)

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import layouts, model
from benchmarks.scaling.launches import Launches, launches
from benchmarks.scaling.page import RANKS, Counted, page
from benchmarks.units import __main__ as units
from benchmarks.units import attention, compiled, gradients, growth, heads, host, memory, ranks, statistics
from benchmarks.units import targets as units_targets
from benchmarks.units.parts import Stopwatch
from benchmarks.units.plan import PARTS, QUICK_PARTS, Measured
from benchmarks.units.timing import Estimate, difference, estimate, interleaved, ratio
from benchmarks.units.workloads import Workload, llama

CPU = torch.device("cpu")
MIB = 1 << 20
SMALL = llama(vocabulary=64, rows=1, tokens=8, width=32, layers=1)


def sure(value: float) -> Estimate:
    return Estimate(value, value, value)


def test_an_estimate_is_the_median_with_an_interval_round_it() -> None:
    """The interval holds the median, is a point where all values are one, and is wider where they scatter."""
    values = [float(value) for value in torch.randn(50, generator=torch.Generator().manual_seed(1))]
    found = estimate(values)
    assert found.low < found.median < found.high
    assert found.median == pytest.approx(float(torch.tensor(values).quantile(0.5)), abs=1e-6)
    assert estimate([2.0] * 9) == sure(2.0)
    assert ratio([2.0, 6.0, 3.0], [1.0, 2.0, 3.0]).median == 2.0
    assert difference([2.0, 6.0, 3.0], [1.0, 2.0, 3.0]).median == 1.0
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_calls_are_interleaved() -> None:
    """Every round runs each call once, in an order that changes; rounds of warming up are not counted."""
    seen: list[str] = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = interleaved(calls, rounds=10, device=CPU, warm_up=2)
    assert {name: len(each) for name, each in times.items()} == {"a": 10, "b": 10, "c": 10}
    rounds = [tuple(seen[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1


def test_a_stopwatch_counts_nested_time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs inside another part is that part's own and is taken from the outer; what a tap reports belongs to the site before it."""
    clock = iter([0.0, 1.0, 4.0, 10.0, 20.0, 21.0, 30.0, 32.0])
    monkeypatch.setattr("benchmarks.units.parts.now", lambda device: next(clock))
    watch = Stopwatch(CPU)
    with watch.around("outer", "a"), watch.around("inner", "b"):
        pass
    with watch.around("inner", ""):
        pass
    assert watch.seconds == {"outer": 7.0, "inner": 4.0}
    with watch.around("attention", None):
        pass
    assert watch.by_site["attention", ""] == 2.0


def test_the_peak_is_what_the_allocator_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that holds 24 MiB beside the training's 8 is found with its size, as what ran at the peak, and as the extra."""

    def at_end(self: Any, end: Any, buffer: Any) -> None:
        torch.empty(24 * MIB, dtype=torch.uint8).fill_(1)

    monkeypatch.setattr("probe.capture.observers.gradients.GradientWatcher.step_end", at_end)
    found = memory.extra_peak(SMALL, device=CPU)
    assert found.at_peak == "gradients"
    assert next(part for part in found.parts if part.name == "gradients").most_mib == pytest.approx(24.0, abs=0.5)
    assert 20.0 < found.extra_mib < 26.0
    assert memory.target([found]).met
    assert not memory.target([memory.Peak("some", 1.0, 65.0, "heads", found.parts)]).met


def test_a_curve_knows_its_peak_and_its_parts() -> None:
    """Bytes add up over time; a part's most and left are beside what was there when it began."""
    spans = [memory.Span("early", 10, 30), memory.Span("late", 35, 60)]
    curve = memory.Curve([(5, 8 * MIB), (12, 4 * MIB), (20, -4 * MIB), (40, 16 * MIB), (50, -15 * MIB), (70, 2 * MIB)], spans)
    assert curve.peak == 24 * MIB
    assert curve.at_peak() == "late"
    assert [(part.name, part.most_mib, part.left_mib) for part in curve.parts()] == [("late", 16.0, 1.0), ("early", 4.0, 0.0)]


def test_attention_is_timed_for_each_kind_and_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder, decoder and cross layers each have a forward and an added time above 0; the matrix is that of all heads of the batch."""
    monkeypatch.setattr(attention, "LAYERS", 2)
    rows, held = attention.attention_costs(CPU, cases=[("tiny", 1)], rounds=1)
    assert [row.kind for row in rows] == ["encoder", "decoder", "cross", "all layers"]
    assert all(row.layer_ms > 0 and row.first_ms > 0 and row.later_ms > 0 for row in rows)
    assert rows[3].layer_ms > max(row.layer_ms for row in rows[:3])  # of six layers together
    assert held[0].matrix_mib == 6 * 1500 * 1500 * 4 / MIB
    assert 0.1 < held[0].extra_mib < held[0].matrix_mib


def test_what_is_done_at_the_root_is_shared_out_to_the_layers() -> None:
    """Each of six layers adds its own time and a sixth of the root's; all of them together take the sum, the root's included."""
    kinds = [("encoder", "self_attn"), ("decoder", "self_attn"), ("decoder", "encoder_attn")]
    names = [f"model.{part}.layers.{n}.{layer}" for part, layer in kinds for n in (0, 1)]
    own = {name: [2.0, 2.0] for name in names}
    added = {"": [0.6, 0.6], **{name: [0.5 if ".0." in name else 0.3] * 2 for name in names}}
    rows = attention._rows("tiny", 1, own, added)
    assert [row.kind for row in rows] == ["encoder", "decoder", "cross", "all layers"]
    for row in rows[:3]:
        assert (row.first.median, row.later.median) == pytest.approx((0.3, 0.2))
        assert (row.layer_ms, row.first_ms, row.later_ms) == pytest.approx((2000.0, 600.0, 400.0))
    assert (rows[3].layer_ms, rows[3].first_ms) == pytest.approx((12_000.0, 3_000.0))


def test_attention_is_judged_by_its_worst_case() -> None:
    """5 % of the layer and a twentieth of the matrix: at the bound it is met, above it not, first call or later."""

    def row(first: float, later: float) -> attention.AttentionRow:
        return attention.AttentionRow("tiny", 1, "encoder", 10.0, first, later, sure(first), sure(later))

    def whole() -> attention.AttentionRow:
        return attention.AttentionRow("tiny", 1, "all layers", 10.0, 9.0, 9.0, sure(0.9), sure(0.9))

    held = [attention.AttentionMemory("tiny", 1, 1.0, 20.0)]
    assert [one.met for one in attention.target([row(0.05, 0.04), whole()], held)] == [True, True]
    assert attention.target([row(0.06, 0.04), whole()], held)[0].met is False
    assert attention.target([row(0.05, 0.051), whole()], held)[0].met is False
    some = attention.target([row(0.06, 0.04), replace(row(0.05, 0.04), clips=4), whole()], held)[0]
    assert some.met is False and some.why.endswith("layer itself is small; the bound is kept by tiny with 4 clips (5.0%, later 4.0%)")
    assert "the bound is kept by" not in attention.target([row(0.06, 0.04), whole()], held)[0].why
    over = [*held, attention.AttentionMemory("tiny", 1, 1.1, 20.0)]
    assert attention.target([row(0.05, 0.04), whole()], over)[1].met is False


def test_a_share_of_bandwidth_counts_bytes_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics that take half as long as a copy, which moves every byte twice, reach its bandwidth; judged on a GPU only."""

    def faked(calls: Any, **_: Any) -> dict[str, list[float]]:
        return {"statistics": [0.5] * 5, "copy": [1.0] * 5, "sum": [0.25] * 5}

    monkeypatch.setattr(statistics, "interleaved", faked)
    rows = statistics.bandwidths(CPU, sizes_mib=(16,), rounds=5)
    assert [row.dtype for row in rows] == ["float32", "bfloat16"]
    assert rows[0].share == sure(1.0)
    assert rows[0].over_sum == sure(2.0)
    assert rows[0].copy_gb_s == pytest.approx(2 * 16 * MIB / 1e9)
    assert statistics.target(rows, CPU).met is None
    assert statistics.target(rows, torch.device("cuda")).met is True
    slow = statistics.Bandwidth(64, "float32", 1.0, 1.0, sure(0.79), sure(1.0))
    assert statistics.target([*rows, slow], torch.device("cuda")).met is False


def test_parts_of_gradients_are_timed_step_by_step() -> None:
    """AdamW's step and the probe's reading of gradients are both seen in every step of an unmodified Trainer."""
    (row,) = gradients.gradient_costs(CPU, tensors=(4,), rounds=2)
    assert row.tensors == 4
    assert row.optimizer_ms > 0
    assert row.probe_ms > 0
    grown = [gradients.GradientRow(100, 1.0, 1.0, sure(1.0)), gradients.GradientRow(1000, 1.0, 12.6, sure(1.0))]
    assert gradients.target(grown).met is False
    assert gradients.target([grown[0], gradients.GradientRow(1000, 1.0, 12.4, sure(1.0))]).met is True


def test_heads_are_judged_by_the_time_of_a_logit() -> None:
    """Real vocabularies are scored with their memory; a time per logit that grows by more than a quarter is missed."""
    rows = heads.head_costs(CPU, vocabularies=(500, 1000), rows=16, rounds=1)
    assert [(row.vocabulary, row.dtype) for row in rows] == [(v, d) for v in (500, 1000) for d in ("float32", "bfloat16")]
    assert all(row.score_ms > 0 and row.extra_mib > 0 for row in rows)

    def row(vocabulary: int, ns: float) -> heads.HeadRow:
        return heads.HeadRow(vocabulary, "float32", 1.0, 1.0, sure(1.0), ns, 1.0, 1.0)

    assert heads.target([row(10, 1.0), row(100, 1.25)]).met is True
    assert heads.target([row(10, 1.0), row(100, 1.26)]).met is False


def test_an_idle_site_has_no_hook_and_the_wrapper_is_timed() -> None:
    """No hook stands in an unsampled step; the wrapped training_step costs more than nothing; judged by the interval's upper end."""
    rows = host.idle_costs(CPU, sites=(3,), rounds=2)
    assert rows[0].hooks == 0
    assert rows[0].plain_us > 0
    wrapper = host.wrapper_cost(CPU, rounds=3)
    assert 0 < wrapper.median < 1e-3
    assert host.target([host.IdleRow(1000, 1.0, Estimate(500.0, 400.0, 990.0), 0)], sure(5e-6)).met is True
    assert host.target([host.IdleRow(1000, 1.0, Estimate(500.0, 400.0, 999.0), 0)], sure(5e-6)).met is False
    assert host.target([host.IdleRow(1000, 1.0, sure(10.0), 2)], sure(5e-6)).met is False


def test_sizes_are_those_of_the_files() -> None:
    """The record's bytes are what the run folder grows by, and the packed bytes those of the counted columns."""
    found = host.sizes(SMALL, CPU, steps=4)
    assert found.record_bytes > 1000
    assert found.folder_bytes == pytest.approx(found.record_bytes, rel=0.2)
    assert found.packed_bytes == 8 * (found.columns.sums + found.columns.maxima)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_fit_finds_the_exponent(power: float) -> None:
    """Cost that grows as a power of the size is found to do so; linear cost with its slope and fixed part exactly."""
    sizes = [1, 2, 4, 8, 16, 32]
    added = [[1e-3 * (0.5 + size**power) for _ in range(3)] for size in sizes]
    found = growth.fit("sites", sizes, added)
    assert (found.exponent.median > growth.MOST_EXPONENT) == (power == 2.0)
    if power == 1.0:
        assert found.slope_us == pytest.approx(1000.0)
        assert found.fixed_ms == pytest.approx(0.5)
        assert found.exponent.median == pytest.approx(1.0)


def test_growth_is_judged_by_exponent_and_ageing() -> None:
    """Quadratic growth, and late steps that take longer, are missed."""
    row = growth.fit("sites", [1, 2, 4], [[1.0], [2.0], [4.0]])
    fast = growth.fit("bytes", [1, 2, 4], [[1.0], [4.0], [16.0]])
    flat, older = growth.Ageing("a", "b", 1.0, sure(1.0)), growth.Ageing("a", "b", 1.0, sure(1.2))
    assert [target.met for target in growth.targets([row, fast], flat)] == [True, False, True]
    assert growth.targets([row], older)[-1].met is False
    wide = growth.Ageing("a", "b", 1.0, Estimate(1.2, 1.05, 1.4))
    assert (growth.targets([row], wide)[-1].met, growth.targets([row], wide)[-1].why[:9]) == (None, "undecided")


def test_growth_below_the_noise_is_not_told() -> None:
    """Where no round's cost grows, there is no exponent, and the target is neither met nor missed."""
    row = growth.fit("sites", [1, 2, 4], [[3.0], [-2.0], [-1.0]])
    assert row.exponent is None
    found = growth.targets([row], growth.Ageing("a", "b", 1.0, sure(1.0)))[0]
    assert (found.met, found.why) == (None, "what is added lies below the noise")
    assert "exponent not told" in found.measured


def test_what_a_site_adds_is_measured() -> None:
    """Sampled steps of tiny models are timed against plain ones: over sites, bytes, micro-batches, and along a run."""
    assert growth.over_sites(CPU, layers=(1, 2, 3), rounds=2).sizes == [2, 4, 6]
    assert growth.over_bytes(CPU, tokens=(16, 32, 64), rounds=2).sizes == [32, 64, 128]
    assert len(growth.over_micro_batches(CPU, counts=(1, 2, 4), rounds=2).added_ms) == 3
    assert growth.along_a_run(CPU, late=15, span=5).early_ms > 0


def test_rank_0_reads_the_word_of_every_other_rank() -> None:
    """The agreement's own code is timed on a real store, where it agrees; a client's request is timed, too."""
    rows = ranks.store_costs(worlds=(4, 8), rounds=2)
    assert [row.world for row in rows] == [4, 8]
    assert all(row.ms.median > 0 and row.request_us > 0 for row in rows)


def test_two_processes_time_their_collectives() -> None:
    """Both gloo processes reduce the probe's columns; rank 0's times arrive."""
    rows = ranks.reduce_costs(worlds=(2,), columns=(600, 6000), rounds=2)
    assert [(row.world, row.columns) for row in rows] == [(2, 600), (2, 6000)]
    assert all(0 < row.ms.median < 5000 for row in rows)
    assert "6,000 columns on 2 ranks" in ranks.target(rows).measured


def test_the_command_writes_rows_targets_and_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file holds machine, rows, targets in the agreed form, and a part that fails with its error while the others go on."""

    def fails(device: torch.device) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(QUICK_PARTS, "ranks", fails)  # type: ignore[arg-type]
    output = tmp_path / "units.json"
    monkeypatch.setattr(sys, "argv", ["units", "--quick", "--only", "ranks", "heads", "--output", str(output)])
    units.main()
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["failed"] == {"ranks": "RuntimeError: no such thing"}
    assert list(report["rows"]) == ["heads"]
    assert [set(target) for target in report["targets"]] == [{"target", "bound", "measured", "met", "why"}]
    assert report["machine"]["torch"] == torch.__version__
    assert set(PARTS) == set(QUICK_PARTS)
    assert "ranks: failed" in capsys.readouterr().out


def test_a_layout_is_counted_as_the_probe_packs_it() -> None:
    """Columns counted on the meta device are those of the same model with weights, and those that a real run packs."""
    real, _ = SMALL.make()
    with torch.device("meta"):
        shape = type(real)(real.config)
    counted = layouts.columns("x", shape)
    assert counted == layouts.columns("x", real)
    layout = layouts.observation_of(real)._layout
    assert counted.sum_bytes == 8 * sum(len(cell.sums) + len(cell.counts) for cell in layout.cells)
    assert counted.maximum_bytes == 8 * sum(len(cell.maxima) for cell in layout.cells)


def test_a_forward_without_data_counts_outputs_and_operations() -> None:
    """Bytes of what sites return are those of their shapes; operations those of the matrix products."""
    load = llama(vocabulary=100, rows=1, tokens=8, width=64, layers=2)
    real, _ = load.make()
    with torch.device("meta"):
        shape = type(real)(real.config)
    seen = layouts.watched(shape, layouts.text_batch(8))
    assert seen.output_bytes == 2 * (2 * 8 * 64 + 8 * 100)
    assert (seen.logits, seen.attention_calls) == (800, 2)
    weights = sum(p.numel() for name, p in real.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert seen.forward_flops == pytest.approx(2 * 8 * weights, rel=0.15)  # and attention's two products


def test_collectives_follow_the_model() -> None:
    """A ring's latency is linear in the ranks, a tree's logarithmic; the bytes of a ring are 2(p-1)/p of the vector."""
    network = model.Network(latency_s=1e-5, bytes_s=1e10)
    assert model.ring_s(0, 1001, network) == pytest.approx(2 * 1000 * 1e-5)
    assert model.tree_s(0, 1024, network) == pytest.approx(2 * 10 * 1e-5)
    assert model.tree_s(5, 1, network) == 0.0
    assert model.ring_s(10**10, 2, network) == pytest.approx(1.0 + 2e-5)
    assert model.ring_bytes(1000, 4) == 1500.0
    assert model.both(0, 0, 2, network) == (4e-5, 4e-5)
    assert model.line([(1.0, 9.0), (2.0, 5.0), (4.0, 9.0)]) == (2.0, 1.0)
    with pytest.raises(ValueError, match="two points"):
        model.line([(1.0, 1.0)])


def counted() -> Counted:
    columns = [layouts.Columns(name, 10**9, 10, 100, 50, 5000, 1000) for name in ("one", "two")]
    return Counted(columns, {"one": layouts.Watched(10**9, 10**6, 4, 1e15)}, Launches(10.0, 100.0))


def test_the_page_holds_its_figures() -> None:
    """Measured figures stand in the page with what follows from them; each world has its line; without a file nothing measured is shown."""
    report = {
        "machine": {"date": "2026-01-02", "device": "a CPU", "torch": "9.9", "transformers": "8.8"},
        "rows": {
            "ranks": {
                "store": [{"world": w, "ms": {"median": w * 0.5, "low": 1, "high": 2}, "request_us": 40.0} for w in (8, 64)],
                "all_reduce": [{"world": 2, "columns": 6000, "ms": {"median": 1.5, "low": 1.0, "high": 2.0}}],
            },
            "heads": [{"vocabulary": 1000, "dtype": "float32", "over_loss": {"median": 4.0}}],
            "memory": [{"workload": "some model", "plain_mib": 100.0, "extra_mib": 3.25, "at_peak": "heads", "parts": []}],
            "host": {"bytes": [{"workload": "small", "columns": {"cells": 10}, "record_bytes": 2000}]},
        },
    }
    text = page(report, counted(), source="units.json")
    assert "Measured: units.json, 2026-01-02 · a CPU · torch 9.9" in text
    assert "500 µs a rank" in text  # the slope of the store
    assert "25,000 a second" in text
    assert "| 2 | 6,000 | 1.5 [1, 2] |" in text
    assert "some model | 100 MiB | 3.2 MiB" in text
    assert "A head costs 4 times" in text
    assert "(200 bytes each)" in text
    # 140 operations of 10 us, 1 GB at 2.4 TB/s, 12 MB four times read for the head: of 3e15 / 400e12 s.
    share = (140e-5 + 1e9 / 2.4e12 + 48e6 / 2.4e12) / 7.5
    assert f"{share:.2%}" in text
    for world in RANKS:
        assert f"\n| {world:,} | " in text
    assert "{" not in text
    bare = page({"rows": {}}, counted(), source="")
    assert "has not been run" in bare
    assert "## Memory" not in bare


def test_operations_of_a_layer_are_counted() -> None:
    """A layer adds operations, and some are fixed: whole numbers, the same each time."""
    found = launches((1, 2))
    assert 0 < found.a_layer < 200
    assert math.isclose(found.a_layer * 2, round(found.a_layer * 2))
    assert found.fixed > 0


def test_the_newest_file_of_a_gpu_goes_first(tmp_path: Path) -> None:
    """A CUDA device's figures are preferred to a CPU's, newer ones to older ones; without any there is none."""
    assert scaling.newest(tmp_path) is None
    for name in ("units-2026-02-01-cpu.json", "units-2026-01-01-nvidia-h200.json", "units-2026-01-05-nvidia-h200.json"):
        (tmp_path / name).write_text("{}")
    assert scaling.newest(tmp_path) == tmp_path / "units-2026-01-05-nvidia-h200.json"


def test_workloads_are_the_same_each_time() -> None:
    """Made twice, a workload has equal weights and an equal batch."""
    load: Workload = SMALL
    (first, batch), (second, again) = load.make(), load.make()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_each_copy_has_compiled_code_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """What is compiled for the copy without a probe does not serve the others: their sites are reported."""
    torch.compiler.reset()
    row = compiled.compiled_costs(CPU, load=llama(vocabulary=64, rows=1, tokens=8, width=64, layers=1), rounds=2, backend="eager")
    assert row.sites > 0 and row.plain_ms > 0
    assert "nothing was reported" not in "".join(capfd.readouterr())
    torch.compiler.reset()


def test_parts_measured_before_stand_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of another file keep their rows and targets; a part that is in both is refused, one that had failed is not."""

    def failing(device: torch.device) -> Measured:
        raise MemoryError

    target = units_targets.Target("bytes", "1", "2", False)
    parts = {"heads": lambda device: Measured([1], [target]), "ranks": failing}
    monkeypatch.setattr(units, "PARTS", parts)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["units", *arguments])
        units.main()

    first, both = str(tmp_path / "first.json"), str(tmp_path / "both.json")
    run("--only", "heads", "ranks", "--output", first)
    assert list(json.loads(Path(first).read_text())["failed"]) == ["ranks"]
    parts["ranks"] = lambda device: Measured([2], [])
    run("--only", "ranks", "--add", first, "--output", both)
    report = json.loads(Path(both).read_text())
    assert report["rows"] == {"heads": [1], "ranks": [2]} and report["failed"] == {}
    assert [one["target"] for one in report["targets"]] == ["bytes"]
    with pytest.raises(SystemExit):
        run("--only", "heads", "--add", first)
