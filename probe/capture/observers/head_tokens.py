"""What a head predicted: which token it predicts most, and the tokens of a few samples.

Shapes: B samples, S positions, T shown tokens, V vocabulary, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.observers.head_cells import head_cell, named_sums

SHOWN_SAMPLES = 8
SHOWN_TOKENS = 512


class TopTokens:
    """Counts the predictions of every head and codebook over one step, on the device that made them: int32 (V,) each, in the budget."""

    def __init__(self) -> None:
        """Start with no counts."""
        self._counts: dict[tuple[str, int | None], Tensor] = {}
        self._bytes: dict[tuple[str, int | None], int] = {}

    def clear(self) -> None:
        """Forget the counts of a step that came to no end (the buffer has forgotten their bytes)."""
        self._counts, self._bytes = {}, {}

    def blank(self, site: str, codebook: int | None, *, vocabulary: int, device: torch.device, buffer: StepBuffer) -> Tensor | None:
        """Return zeros to count one call's predictions in, or ``None`` if the budget does not admit the step's counts (which is named)."""
        if (site, codebook) not in self._bytes:
            if not buffer.reserve(f"head:{site}/top_token", 4 * vocabulary):
                return None
            self._bytes[site, codebook] = 4 * vocabulary
        return torch.zeros(vocabulary, dtype=torch.int32, device=device)

    def add(self, site: str, codebook: int | None, counts: Tensor) -> None:
        """Add the counts of the one call that counts in its micro-batch."""
        known = self._counts.get((site, codebook))
        self._counts[site, codebook] = counts if known is None else known + counts.to(known.device, non_blocking=True)

    def finish(self, buffer: StepBuffer, *, keep: bool) -> None:
        """Add the largest count of each to its cell (and to that of the whole head), ``keep`` which token it is, and free the counts."""
        for (site, codebook), counts in self._counts.items():
            top, token = counts.max(0)
            most = named_sums(counts.device, top_token=top)
            for name in {head_cell(site, codebook), head_cell(site)}:
                buffer.totals.add(name, sums=most)
            if keep:
                buffer.put(f"top_token:{head_cell(site, codebook)}", token.reshape(1))
        for nbytes in self._bytes.values():
            buffer.release(nbytes)
        self.clear()


def rows_to_show(labels: Tensor) -> int:
    """Return how many rows of predictions :func:`shown_tokens` needs: those of the first samples of labels (B, S), or of (N,)."""
    return labels.numel() if labels.dim() < 2 else labels[:SHOWN_SAMPLES].numel()


def shown_tokens(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return predicted and target ids (B, T) of the first samples, at their labelled positions, in order; -100 ends the targets. No sync.

    Args:
        predictions: The first ``rows_to_show(labels)`` of them, in row-major order.
        labels: (B, S), or (N,) for one row of positions.
    """
    target_BS = labels.reshape(1, -1) if labels.dim() < 2 else labels[:SHOWN_SAMPLES].flatten(1)
    order_BS = (target_BS == -100).to(torch.int8).argsort(dim=1, stable=True)[:, :SHOWN_TOKENS]
    return predictions.view(target_BS.shape).gather(1, order_BS), target_BS.gather(1, order_BS)
