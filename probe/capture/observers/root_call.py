"""Keeps the newest call of the root by reference until the step ends, so that it can be run again with other inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, Watcher

_KEY = "root call"


@dataclass(frozen=True, slots=True)
class RootCall:
    """One training forward of the root: what it was called with, and under what.

    Attributes:
        module: The root itself, below DDP.
        args, kwargs: As the caller gave them, by reference; ``None`` values and batch objects included.
        micro: The micro-batch that the call was.
        autocast: The dtype of the autocast that was on round the call, on the device of the model; ``None`` without. What the root's own
            (accelerate's) forward switches on inside is not meant: it does so again.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    micro: MicroBatch
    autocast: torch.dtype | None = None


class RootCallKeeper(Watcher):
    """Keeps the root's arguments in the micro-batch, which the step buffer lets go of, whatever becomes of the step."""

    def sites(self) -> Sequence[str]:
        """Return the root."""
        return ("",)

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Keep this call, and let go of the one before."""
        for earlier in buffer.micro_batches:
            earlier.scratch.pop(_KEY, None)
        kind = device_of(call.module).type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        call.micro.scratch[_KEY] = RootCall(call.module, call.args, dict(call.kwargs), call.micro, autocast)

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """Forget a call that raised."""
        if call.output is None:
            call.micro.scratch.pop(_KEY, None)


def take_root_call(buffer: StepBuffer) -> RootCall | None:
    """Return the call that was kept, and keep it no longer; ``None`` if the step's last micro-batch saw none."""
    found = buffer.micro_batches[-1].scratch.pop(_KEY, None) if buffer.micro_batches else None
    return found if isinstance(found, RootCall) else None


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
