"""Statistics in one kernel launch a tensor on a GPU, as long as Triton is there and works."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext

import torch
from torch import Tensor

from probe.measure.chunks import dense

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FUSED = "fused_statistics"
"""Under which name it is told why statistics are taken without the kernel that should have taken them."""
_TOLD = 300
_PER_PROCESSOR = 8
_TILES = 32
"""Tiles that a program reads at most: 128 values a lane, over which float32 loses less than 1e-7."""


def installed() -> bool:
    """Say whether Triton can be imported; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


class FusedStatistics:
    """The kernel, what it keeps on each device, and why it is not used any more.

    Results are those of :func:`probe.measure.statistics.summarise` on its other ways: mean and rms within 1e-6, std within 1e-6 of rms,
    non-finite values counted exactly. Holds one int32 a device and stream. The first call for a dtype compiles the kernel, or loads it
    from Triton's cache.
    """

    def __init__(self, devices: tuple[str, ...] = ("cuda",)) -> None:
        """Take tensors on devices of these types; none if Triton is not installed."""
        self.failure: str | None = None
        self._devices = devices if installed() else ()
        self._counters: dict[tuple[torch.device, int], Tensor] = {}

    def available(self, device: torch.device) -> bool:
        """Say whether the kernel runs on a device, as far as is known."""
        return device.type in self._devices and self.failure is None

    def takes(self, x: Tensor) -> bool:
        """Say whether the kernel can reduce a tensor: a plain one, dense in memory in whatever order, of a dtype it knows."""
        return self.available(x.device) and x.dtype in DTYPES and type(x) is Tensor and x.numel() > 0 and dense(x) is not None

    def __call__(self, x: Tensor, *, into: tuple[Tensor, Tensor] | None = None) -> Tensor | None:
        """Reduce a tensor, in one launch on the current stream. No sync.

        A compilation or launch that fails is not tried again: ``failure`` says why, here and in later calls the answer is None.

        Args:
            x: Any shape; not part of a graph.
            into: Contiguous float64 vectors on the same device: of the sum columns, (3,), which are added to, and of the maximum
                columns, (2,), which are raised.

        Returns:
            Float64 (5,): the sum columns, then the maximum columns, or None if the tensor has to be reduced otherwise (nothing was added).
        """
        if not self.takes(x):
            return None
        try:
            return self._launch(x, into)
        except Exception as error:  # whatever a compiler or driver may raise: training goes on without this kernel
            told = " ".join(str(error).split())[:_TOLD]
            self.failure = f"the fused kernel failed with {type(error).__name__}: {told}; the statistics are taken without it"
            return None

    def _launch(self, x: Tensor, into: tuple[Tensor, Tensor] | None) -> Tensor:
        from probe.measure import statistics_kernel as kernel  # Triton is optional

        flat = dense(x)
        assert flat is not None
        count = flat.numel()
        tiles = -(-count // kernel.TILE)
        programs = min(tiles, max(_PER_PROCESSOR * self._processors(x.device), -(-tiles // _TILES)))
        out = torch.empty(5, dtype=torch.float64, device=x.device)
        partial = torch.empty(5 * programs, dtype=torch.float64, device=x.device)
        sums, maxima = into or (out, out)
        arguments = (flat, count, partial, self._counter(x.device), out, sums, maxima)
        # A launch goes to the device that is current, which is not always the tensor's.
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            kernel.reduce_columns[(programs,)](*arguments, ADD=into is not None, **kernel.OPTIONS)
        return out

    def _processors(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

    def _counter(self, device: torch.device) -> Tensor:
        """Return the counter of a device's current stream: launches that run side by side must not share one."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        found = self._counters.get((device, stream))
        if found is None:
            found = self._counters[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
        return found
