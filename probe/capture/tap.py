"""Sees the attention calls inside one module call: a torch function mode that passes everything through and reports a copy of the facts.

Shapes: B batch, S tokens (queries), K keys, H query heads, h key heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from probe.measure.probabilities import NotObservable, RowProbabilities, rows_from_sdpa, rows_from_softmax

_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention call, its tensors detached and by reference: use them at once, keep none.

    Attributes:
        kind: "sdpa": ``F.scaled_dot_product_attention`` was called, and ``q_BHSD`` to ``dropout_p`` are its arguments as given.
            "softmax": the model computes attention itself; ``scores_BHSK`` went into its softmax and ``weights_BHSK`` came out.
        autocast_dtype: The dtype to which autocast rounds q, k and mask on their way into the kernel; ``None`` without autocast.
    """

    kind: Literal["sdpa", "softmax"]
    q_BHSD: Tensor | None = None
    k_BhKD: Tensor | None = None
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    dropout_p: float = 0.0
    autocast_dtype: torch.dtype | None = None
    scores_BHSK: Tensor | None = None
    weights_BHSK: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, S, K) of the attention matrix."""
        if self.q_BHSD is not None and self.k_BhKD is not None:
            samples, heads, queries, _ = self.q_BHSD.shape
            return samples, heads, queries, self.k_BhKD.shape[2]
        assert self.weights_BHSK is not None
        samples, heads, queries, keys = self.weights_BHSK.shape
        return samples, heads, queries, keys

    def rows(self, index_BR: Tensor) -> RowProbabilities:
        """Return the probabilities before dropout of some query rows.

        Raises:
            NotObservable: see :mod:`probe.measure.probabilities`.
        """
        if self.q_BHSD is None or self.k_BhKD is None:
            assert self.scores_BHSK is not None
            assert self.weights_BHSK is not None
            return rows_from_softmax(self.scores_BHSK, self.weights_BHSK, index_BR=index_BR)
        return rows_from_sdpa(
            self.q_BHSD,
            self.k_BhKD,
            attn_mask=self.attn_mask,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
            index_BR=index_BR,
            autocast_dtype=self.autocast_dtype,
        )


class AttentionTap(TorchFunctionMode):
    """Entered in an attention module's forward pre-hook, left in its post-hook; one tap a module call.

    Every function runs as the model called it and its own result object is returned. Reported are all calls of
    ``F.scaled_dot_product_attention`` with 4-D q and k, and the first softmax over the last of four dimensions if it comes before any of
    them (a later one is of something else). It sees only this thread, and only what is called between enter and exit. It is blind to
    attention inside ``F.multi_head_attention_forward`` (``nn.MultiheadAttention``) and to kernels that are no torch function
    (flash attention): then ``reported`` stays 0. ``num_heads`` opens a softmax over (B * H, S, K).

    Args:
        on_attention: Called under ``no_grad`` after the function returned. What it raises goes to ``on_error``, never to the model.
        on_error: Told of exceptions of ``on_attention``, and at the exit of a :class:`NotObservable` if the only calls that were seen
            cannot be read (3-D q, or a 3-D softmax without ``num_heads``). It must not raise.
        num_heads: Heads of the module, if they are known.

    Attributes:
        reported: Calls reported so far.
    """

    def __init__(
        self,
        on_attention: Callable[[AttentionCall], None],
        on_error: Callable[[Exception], None],
        *,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.reported = 0
        self._on_attention = on_attention
        self._on_error = on_error
        self._num_heads = num_heads
        self._unreadable: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the function as called; then report it if it is attention.

        By name, because a model (or a trainer) may have put its own function in the place of torch's: the operator keeps its name.
        """
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention" or (name == "softmax" and self.reported == 0):
            try:
                with torch.no_grad():
                    self._see(name, args, kwargs, result)
            except Exception as error:
                self._on_error(error)
        return result

    def __exit__(self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None) -> None:
        """Leave the mode; say what could not be read, unless the module raised or another call was reported."""
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        if exc_type is None and self.reported == 0 and self._unreadable is not None:
            self._on_error(NotObservable(self._unreadable))

    def _see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        call = self._sdpa_call(args, kwargs) if name == "scaled_dot_product_attention" else self._softmax_call(args, kwargs, result)
        if call is not None:
            self.reported += 1
            self._on_attention(call)

    def _sdpa_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall | None:
        given = {**dict(zip(_SDPA_NAMES, args)), **kwargs}
        q, k, mask = given["query"].detach(), given["key"].detach(), given.get("attn_mask")
        if q.dim() != 4 or k.dim() != 4:
            self._unreadable = f"scaled_dot_product_attention on q {tuple(q.shape)}: not (batch, heads, queries, width)"
            return None
        device = q.device.type
        return AttentionCall(
            kind="sdpa",
            q_BHSD=q,
            k_BhKD=k,
            attn_mask=None if mask is None else mask.detach(),
            is_causal=bool(given.get("is_causal", False)),
            scale=given.get("scale"),
            enable_gqa=bool(given.get("enable_gqa", False)),
            dropout_p=float(given.get("dropout_p", 0.0)),
            autocast_dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        )

    def _softmax_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], weights: Any) -> AttentionCall | None:
        scores = args[0] if args else kwargs.get("input")
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(scores, Tensor) or not isinstance(weights, Tensor) or dim not in (-1, weights.dim() - 1):
            return None
        scores, weights = scores.detach(), weights.detach()
        if weights.dim() == 3:
            heads = self._num_heads
            if heads is None or weights.shape[0] % heads:
                self._unreadable = f"softmax over {tuple(weights.shape)}: not (batch, heads, queries, keys)"
                return None
            scores, weights = (part.reshape(-1, heads, *part.shape[1:]) for part in (scores, weights))
        return AttentionCall(kind="softmax", scores_BHSK=scores, weights_BHSK=weights) if weights.dim() == 4 else None
