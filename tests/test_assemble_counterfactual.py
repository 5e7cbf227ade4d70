"""How the sums of counterfactual passes become effects, samples, metrics and reasons."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from probe.assemble.counterfactual import counterfactual
from probe.assemble.draft import Draft, RunContext
from probe.assemble.text import Decoder
from probe.capture.buffer import StepBuffer
from probe.capture.cells import CellValues
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call
from probe.capture.observers.root_call import RootCallKeeper, take_root_call
from probe.counterfactual.effects import SUMS, effect_cell, effect_sums
from probe.counterfactual.passes import JOINED
from probe.counterfactual.watcher import FACTS, PassFacts, table_key
from probe.merge.packing import HostStep
from probe.records import Counterfactual, Site
from probe.sites.discovery import SiteMap

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

# Four samples: loss as it is, loss under the swap, tokens.
ROWS = [(4.0, 6.0, 2.0), (9.0, 9.0, 3.0), (2.0, 1.0, 1.0), (10.0, 16.0, 5.0)]


def cell(unknown: float = 0.0, passes: float = 1.0) -> CellValues:
    sums = effect_sums(torch.tensor(ROWS, dtype=torch.float64), torch.tensor([0.6, 3.0]))
    return CellValues({"passes": passes, "samples_unknown": unknown}, dict(zip(SUMS, sums.tolist(), strict=True)), {})


def assembled(
    *modalities: Any,
    cells: dict[str, CellValues],
    known: bool = True,
    reasons: dict[str, str] | None = None,
    blind: dict[str, str] | None = None,
) -> tuple[Counterfactual | None, Draft]:
    sites = tuple(Site(f"{modality}_head", "lm_head", "", modality=modality) for modality in modalities)
    table = np.array([[loss, tokens, changed, tokens] for loss, changed, tokens in ROWS])
    cost = SimpleNamespace(milliseconds=lambda: 12.5)
    facts: dict[str, Any] = {FACTS: PassFacts(("speech",), {"text": ("swap",)}, cost)} if known else {}  # type: ignore[arg-type]
    step = HostStep(cells, {table_key("text"): table} if known else {}, facts, reasons or {})
    run = RunContext(SiteMap(sites, {}), None, (), 1, Decoder([], print))  # type: ignore[arg-type]
    draft = Draft(step, run, blind=blind or {})
    return counterfactual(draft), draft


def test_an_effect_is_its_sums_divided_once() -> None:
    """Loss, difference, win rate and divergence by hand; the standard error is that of the residuals of a ratio of sums."""
    found, draft = assembled("text", cells={effect_cell("text", "swap"): cell()})
    assert found is not None
    (effect,) = found.effects
    ratio = 7 / 11
    residuals = [changed - loss - ratio * tokens for loss, changed, tokens in ROWS]
    assert (effect.samples, effect.tokens, effect.win_rate, effect.divergence_tokens) == (4, 11, 2.5 / 4, 3)
    assert effect.loss == pytest.approx(25 / 11) and effect.delta_loss == pytest.approx(ratio)
    assert effect.delta_loss_error == pytest.approx(math.sqrt(4 / 3 * sum(each**2 for each in residuals)) / 11)
    assert effect.divergence == pytest.approx(0.2)
    assert draft.metrics["probe/reference/delta_loss_swap"] == draft.metrics["probe/reference/text/delta_loss_swap"] == effect.delta_loss
    assert draft.metrics["probe/reference/cost_ms"] == found.cost_ms == 12.5
    assert [sample.swap for sample in found.samples] == [3.0, 3.0, 1.0, 3.2]


def test_samples_that_are_not_known_give_no_share() -> None:
    """Where some rank could not tell samples apart, there is neither a win rate nor an error, and the reason says so."""
    found, draft = assembled("text", cells={effect_cell("text", "swap"): cell(unknown=1.0)})
    assert found is not None
    assert (found.effects[0].win_rate, found.effects[0].delta_loss_error) == (None, None)
    assert found.effects[0].delta_loss is not None
    assert draft.reasons["probe/reference/win_rate"] == draft.reasons["probe/reference/text/win_rate"] == JOINED


def test_audio_leads_where_it_is_predicted() -> None:
    """The metrics without a modality are the audio head's, and never fall back to text."""
    cells = {effect_cell("text", "swap"): cell()}
    _, draft = assembled("text", "audio", cells=cells, reasons={"counterfactual/audio": "no audio labels"})
    assert "probe/reference/text/delta_loss_swap" in draft.metrics
    assert draft.reasons["probe/reference/delta_loss_swap"] == "no audio labels"


def test_the_narrowest_reason_is_told() -> None:
    """Of a modality under an intervention, of the intervention, of the modality, of all."""
    every = {
        "counterfactual": "all",
        "counterfactual/text": "text",
        "counterfactual/silence": "silence",
        "counterfactual/text/reverse": "text reversed",
    }
    _, draft = assembled("text", cells={effect_cell("text", "swap"): cell()}, reasons=every)
    assert draft.reasons["probe/reference/text/delta_loss_silence"] == "silence"
    assert draft.reasons["probe/reference/text/delta_loss_reverse"] == "text reversed"
    assert draft.reasons["probe/reference/text/divergence_silence"] == "silence"


def test_a_part_that_is_off_has_no_numbers() -> None:
    """What other ranks added is not shown when the part has failed."""
    found, draft = assembled("text", cells={effect_cell("text", "swap"): cell()}, blind={"counterfactual": "switched off"})
    assert found is None and draft.metrics == {}
    assert set(draft.reasons.values()) == {"switched off"}


def test_a_rank_without_passes_shows_those_of_the_others() -> None:
    """The effects are there, the samples are not, and its own reason is."""
    found, draft = assembled(
        "text", cells={effect_cell("text", "swap"): cell()}, known=False, reasons={"counterfactual": "no audio in this batch"}
    )
    assert found is not None and found.samples == () and found.inputs == () and found.cost_ms is None
    assert draft.reasons["counterfactual"] == "this rank has no samples to show: no audio in this batch"
    assert draft.reasons["probe/reference/cost_ms"]


def test_a_root_call_that_raised_is_not_run_again() -> None:
    """Its arguments are forgotten when it ends without an output; those of one that returned are handed out once."""
    keeper, model = RootCallKeeper(), nn.Linear(1, 1)
    for output in (None, torch.ones(1)):
        buffer = StepBuffer(budget_bytes=1000)
        buffer.micro_batches.append(MicroBatch(0))
        call = Call(Site("", "model", ""), model, buffer.micro_batches[0], (torch.ones(1),), {})
        keeper.enter(call, buffer)
        call.output = output
        keeper.leave(call, buffer)
        assert (take_root_call(buffer) is not None) == (output is not None)
        assert take_root_call(buffer) is None
