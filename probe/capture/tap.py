"""Sees the attention calls inside one module call: a torch function mode that passes everything through and reports where the rows are.

Shapes: B batch, S tokens (queries), K keys, H query heads, h key heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from probe.measure.blocks import NotObservable, RowSource
from probe.measure.probabilities import FromScores, FromSoftmax
from probe.measure.scores import Scores

_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class AttentionTap(TorchFunctionMode):
    """Entered in an attention module's forward pre-hook, left in its post-hook; one tap a module call.

    Every function runs as the model called it and its own result object is returned. Reported are all calls of
    ``F.scaled_dot_product_attention`` with 4-D q and k, and the first softmax over the last of four dimensions if it comes before any of
    them (a later one is of something else). It sees only this thread, and only what is called between enter and exit. It is blind to
    attention inside ``F.multi_head_attention_forward`` (``nn.MultiheadAttention``) and to kernels that are no torch function: whoever
    stands round such a kernel says so with :meth:`report`. If nobody does, ``reported`` stays 0.

    Args:
        on_attention: Called under ``no_grad`` with the rows' source after the function returned; use it at once, keep none of it. What it
            raises goes to ``on_error``, never to the model.
        on_error: Told of exceptions of ``on_attention``, and at the exit of a :class:`NotObservable` if the only calls that were seen
            cannot be read (3-D q, a 3-D softmax without ``num_heads``, …). It must not raise.
        num_heads: Heads of the module, if they are known: opens a softmax over (B * H, S, K).
        sinks: Whether the module has a learned sink a head: then the last column of its softmax is the sink, and no key.

    Attributes:
        reported: Calls reported so far.
    """

    def __init__(
        self,
        on_attention: Callable[[RowSource], None],
        on_error: Callable[[Exception], None],
        *,
        num_heads: int | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        self.reported = 0
        self._on_attention = on_attention
        self._on_error = on_error
        self._num_heads = num_heads
        self._sinks = int(sinks)
        self._unreadable: NotObservable | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the function as called; then report it if it is attention.

        By name, because a model (or a trainer) may have put its own function in the place of torch's: the operator keeps its name.
        """
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            self.report(lambda: _of_sdpa(args, kwargs))
        elif name == "softmax" and self.reported == 0:
            self.report(lambda: self._of_softmax(args, kwargs, result))
        return result

    def __exit__(self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None) -> None:
        """Leave the mode; say what could not be read, unless the module raised or another call was reported."""
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        if exc_type is None and self.reported == 0 and self._unreadable is not None:
            self._on_error(self._unreadable)

    def report(self, read: Callable[[], RowSource | None]) -> None:
        """Report one attention call. Raises nothing.

        Args:
            read: Returns the source of its rows, or ``None`` if it is no attention after all; called under ``no_grad``. A
                :class:`NotObservable` that it raises is told at the exit, if no call was reported until then.
        """
        try:
            with torch.no_grad():
                try:
                    source = read()
                except NotObservable as reason:
                    self._unreadable = reason
                    return
                if source is not None:
                    self.reported += 1
                    self._on_attention(source)
        except Exception as error:
            self._on_error(error)

    def _of_softmax(self, args: tuple[Any, ...], kwargs: dict[str, Any], weights: Any) -> FromSoftmax | None:
        scores = args[0] if args else kwargs.get("input")
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(scores, Tensor) or not isinstance(weights, Tensor) or dim not in (-1, weights.dim() - 1):
            return None
        scores, weights = scores.detach(), weights.detach()
        if weights.dim() == 3:
            heads = self._num_heads
            if heads is None or weights.shape[0] % heads:
                raise NotObservable(f"softmax over {tuple(weights.shape)}: not (batch, heads, queries, keys)")
            scores, weights = (part.reshape(-1, heads, *part.shape[1:]) for part in (scores, weights))
        return FromSoftmax(scores, weights, sinks=self._sinks) if weights.dim() == 4 else None


def _of_sdpa(args: tuple[Any, ...], kwargs: dict[str, Any]) -> FromScores:
    given = {**dict(zip(_SDPA_NAMES, args)), **kwargs}
    q, k, mask = given["query"].detach(), given["key"].detach(), given.get("attn_mask")
    if q.dim() != 4 or k.dim() != 4:
        raise NotObservable(f"scaled_dot_product_attention on q {tuple(q.shape)}: not (batch, heads, queries, width)")
    device = q.device.type
    return FromScores(
        Scores(
            q,
            k,
            scale=given.get("scale"),
            mask=None if mask is None else mask.detach(),
            causal_offset=0 if given.get("is_causal", False) else None,  # aligned at the top left, also when S is not K
            autocast_dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        )
    )
