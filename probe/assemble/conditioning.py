"""Whether audio reached the model, and by which loss it learns: encoder, projector, branches, loss and learning rate of a record."""

from __future__ import annotations

from collections.abc import Sequence

from probe.assemble.draft import Draft, ratio
from probe.assemble.gradients import reference_gradient, why_no_activation_gradient
from probe.assemble.inputs import audio_codes, placeholder_counts
from probe.capture.observers.branches import branch_cell
from probe.capture.observers.gradients import LOSS_SCALE
from probe.capture.observers.loss import CELL as LOSS
from probe.records import ActivationGradient, Branches, Conditioning, Optimisation, SiteStatistics
from probe.sites.batch import AUDIO_CODES


def conditioning(draft: Draft, found: Sequence[SiteStatistics], gradients: Sequence[ActivationGradient]) -> Conditioning:
    """Return the conditioning row, and enter the ``probe/audio_encoder/…`` and ``probe/projector/…`` metrics."""
    encoders = [row for row in found if row.role == "audio_encoder"]
    projectors = [row for row in found if row.role == "projector"]
    micro_batches = int(draft.count("step", "micro_batches"))
    gradient = None
    if encoders:
        _encoder_metrics(draft, encoders[0])
        gradient = _gradient_metric(draft, "probe/audio_encoder/gradient_norm", encoders[0], gradients)
    else:
        draft.reasons.setdefault("audio_encoder", draft.run.sites.missing.get("audio_encoder", "no audio encoder was found"))
    if projectors:
        draft.measure("probe/projector/rms", projectors[0].rms, _why(draft, projectors[0]))
        _gradient_metric(draft, "probe/projector/gradient_norm", projectors[0], gradients)
    reference_gradient(draft)
    calls = encoders[0].calls if encoders else 0
    codes, tokens = audio_codes(draft), tuple(placeholder_counts(draft))
    if codes is None:
        draft.reasons.setdefault("conditioning/audio_codes", _why_no_codes(draft))
    if not tokens:
        named = draft.blind.get("inputs") or _why_no_tokens(draft)
        draft.reasons.setdefault("conditioning/tokens", named)
    return Conditioning(
        encoder=encoders[0].site if encoders else "",
        encoder_calls=calls,
        micro_batches_without_encoder=max(0, micro_batches - calls) if encoders and "statistics" not in draft.blind else 0,
        output_gradient_norm=gradient,
        audio_codes=codes,
        tokens=tokens,
    )


def _why_no_tokens(draft: Draft) -> str:
    return "no input_ids among the inputs" if draft.run.facts.audio_tokens else "the config names no audio token ids"


def _why_no_codes(draft: Draft) -> str:
    if "inputs" in draft.blind:
        return draft.blind["inputs"]
    if not draft.run.facts.codebooks:
        return "the config has no audio codebooks"
    return f"no input holds codes of {draft.run.facts.codebooks} codebooks (looked for {', '.join(AUDIO_CODES)})"


def _why(draft: Draft, row: SiteStatistics) -> str:
    if row.calls == 0:
        return draft.blind.get("statistics", f"{row.site} was not called in any training forward of this step")
    return f"{row.nonfinite} NaN or Inf values in the output of {row.site}" if row.nonfinite else f"the output of {row.site} is empty"


def _encoder_metrics(draft: Draft, row: SiteStatistics) -> None:
    why = _why(draft, row)
    many = why if not row.calls or row.nonfinite else f"its output has the shape {row.shape}: "
    unseen = not row.calls and "statistics" in draft.blind
    draft.measure("probe/audio_encoder/calls", None if unseen else float(row.calls), why)
    draft.measure("probe/audio_encoder/nonfinite", float(row.nonfinite) if row.calls else None, why)
    draft.measure("probe/audio_encoder/rms", row.rms, why)
    draft.measure("probe/audio_encoder/time_std", row.time_std, many if many is why else many + "no time dimension of at least two frames")
    draft.measure("probe/audio_encoder/batch_std", row.batch_std, many if many is why else many + "no batch of at least two clips")


def _gradient_metric(draft: Draft, name: str, row: SiteStatistics, gradients: Sequence[ActivationGradient]) -> float | None:
    """Enter the norm of the gradient that reached a site's output, or why there is none."""
    gradient = next((each for each in gradients if each.site == row.site), None)
    why = why_no_activation_gradient(draft, row.site, gradient) if row.calls else _why(draft, row)
    return draft.measure(name, None if gradient is None else gradient.norm, why)


def branches(draft: Draft) -> tuple[Branches, ...]:
    """Return token counts of every layer with separate feed-forward branches, and enter the share of each branch."""
    layers: dict[str, dict[str, int]] = {}
    for site in draft.run.sites.of("feed_forward") if "branches" not in draft.blind else ():
        tokens = draft.count(branch_cell(site.name), "tokens")
        layers.setdefault(site.name.rpartition(".")[0], {})[site.modality or "text"] = int(tokens)
    rows = tuple(Branches(layer, tokens.get("text", 0), tokens.get("audio", 0)) for layer, tokens in layers.items())
    text, audio = sum(row.text_tokens for row in rows), sum(row.audio_tokens for row in rows)
    why = "no token reached either branch" if rows else "no decoder layer has separate feed-forward branches for text and audio"
    why = draft.blind.get("branches", why)
    draft.measure("probe/feed_forward/text_token_share", ratio(text, text + audio), why)
    draft.measure("probe/feed_forward/audio_token_share", ratio(audio, text + audio), why)
    return rows


def optimisation(draft: Draft) -> Optimisation:
    """Return loss, learning rates and gradient norm of the step, and enter ``probe/loss`` and ``probe/learning_rate``."""
    values = draft.host.cells[LOSS.name]
    ranks = draft.count("step", "ranks")
    total = ratio(values.sums["loss"], ranks) if values.counts["micro_batches"] else None
    why = draft.host.reasons.get("probe/loss", draft.blind.get("loss", "no training_step returned a loss in this step"))
    loss = draft.measure("probe/loss", total, why)
    rates = tuple(draft.host.facts.get("learning_rates", ()))
    draft.measure("probe/learning_rate", rates[0] if rates else None, "the optimizer's learning rates are not known on the host")
    scale = draft.host.local.get(LOSS_SCALE)
    return Optimisation(loss, rates, draft.metrics.get("probe/grad/norm"), None if scale is None else float(scale))
