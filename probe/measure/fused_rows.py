"""Attention rows in one kernel launch a call on a GPU, as long as Triton is there and works.

Shapes: B batch, K keys, H heads, R sampled rows a sample, Q quantities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.measure.blocks import RowSource
from probe.measure.fused_statistics import installed
from probe.measure.places import BAND_KEYS, BAND_SHARE, ROUNDING, OwnKeys
from probe.measure.prepared import Prepared
from probe.measure.probabilities import FromScores
from probe.measure.scores import Scores

FUSED = "attention:fused kernel"
"""Under which name the reason is kept why rows are taken without the kernel that should have taken them."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256
"""Widest head of which a program holds its rows."""


class FusedRows:
    """The kernels, and why they are not used any more. The first call of a kind compiles them, or loads them from Triton's cache."""

    def __init__(self, devices: tuple[str, ...] = ("cuda",)) -> None:
        """Take calls on devices of these types; none if Triton is not installed."""
        self.failure: str | None = None
        self._devices = devices if installed() else ()

    def takes(self, source: RowSource, prepared: Prepared) -> bool:
        """Say whether the kernels can reduce a call.

        Rows that are recomputed, from q and k of one narrow dtype; with masks that are the same for all heads and were worked out; without
        bias, sinks, or rounding by autocast.
        """
        if not isinstance(source, FromScores) or self.failure is not None or source.device.type not in self._devices:
            return False
        given = source.scores
        q, k = given.q_BHSD, given.k_BhKD
        plain = given.bias is None and given.sinks_H is None and given.autocast_dtype in (None, q.dtype)
        return plain and prepared.masks is not None and q.dtype == k.dtype and q.dtype in DTYPES and q.shape[3] <= WIDEST

    def __call__(self, source: RowSource, prepared: Prepared, *, groups: int, covered: bool) -> tuple[Tensor, Tensor | None] | None:
        """Reduce a call. No sync.

        A compilation or launch that fails is not tried again: ``failure`` says why, here and in later calls the answer is ``None``.

        Args:
            source: The call.
            prepared: What was prepared for it.
            groups: Number of groups of keys to add up; 0 for none.
            covered: Whether to add up the rows' probabilities, weighted by those of text rows.

        Returns:
            float32 (Q, B, H, R), as :func:`probe.measure.attention.describe` reduces rows, and float32 (B, H, K) or ``None``; ``None``
            if the call has to be reduced otherwise.
        """
        if not self.takes(source, prepared) or not isinstance(source, FromScores):
            return None
        try:
            return _launch(source.scores, prepared, groups, covered)
        except Exception as error:  # whatever a compiler or driver may raise: training goes on without these kernels
            self.failure = f"the fused kernel failed with {type(error).__name__}: {error}"
            return None


def _launch(given: Scores, prepared: Prepared, groups: int, covered: bool) -> tuple[Tensor, Tensor | None]:
    from probe.measure import rows_kernel as kernel  # Triton is optional

    samples, heads, _, keys = given.shape
    q, k, index_BR = given.q_BHSD.detach(), given.k_BhKD.detach(), prepared.choice.index_BR.contiguous()
    rows, width = index_BR.shape[1], q.shape[3]
    raw_QBHR = torch.empty((6 + groups, samples, heads, rows), dtype=torch.float32, device=q.device)
    normaliser_2BHR = torch.empty((2, samples, heads, rows), dtype=torch.float32, device=q.device)
    where, masks = prepared.where, prepared.masks
    assert masks is not None
    hidden = masks.added is not None
    added_BRK = masks.added[:, 0].contiguous() if masks.added is not None else raw_QBHR
    blind_BR = masks.blind[:, 0].contiguous() if masks.blind is not None else raw_QBHR
    in_keys = isinstance(where, OwnKeys)
    key_BK = (where.key_K[None] if isinstance(where, OwnKeys) else where.key_BK).contiguous()
    code_BK = prepared.sight.key_BK
    strides = (*q.stride(), k.stride(0) if k.shape[0] > 1 else 0, *k.stride()[1:], rows * keys, keys)
    sizes = (heads, heads // k.shape[1], rows, keys, width)
    factors = (width**-0.5 if given.scale is None else given.scale, given.softcap or 0.0)
    options = {"ADDED": hidden, "SOFTCAP": given.softcap is not None, "WIDE": max(16, 1 << (width - 1).bit_length()), **kernel.OPTIONS}
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():  # a launch goes to the device that is current
        kernel.reduce_rows[(samples * heads, -(-rows // kernel.ROWS))](
            *(q, k, index_BR, added_BRK, blind_BR, where.row_BR.contiguous(), key_BK),
            *(code_BK, prepared.sight.first_B1.contiguous(), raw_QBHR, normaliser_2BHR),
            *(*strides, keys if key_BK.shape[0] > 1 else 0, code_BK.stride(0) if code_BK.stride(1) else 0),
            *(*sizes, *factors, BAND_KEYS if in_keys else BAND_SHARE + ROUNDING),
            IN_KEYS=in_keys,
            GROUPS=groups > 0,
            **options,
        )
        if not covered:
            return raw_QBHR, None
        sum_BHK = torch.empty((samples, heads, keys), dtype=torch.float32, device=q.device)
        kernel.add_up_rows[(samples * heads, -(-keys // kernel.KEYS))](
            *(q, k, index_BR, added_BRK, prepared.text_BR.float().contiguous(), normaliser_2BHR, sum_BHK),
            *(*strides, *sizes, *factors),
            **options,
        )
    return raw_QBHR, sum_BHK
