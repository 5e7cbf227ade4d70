"""The root's forward of one micro-batch once more, with other inputs, leaving everything as it was.

What is left untouched: every module's ``training`` flag, every random generator, the model's buffers (batch norm does not count in eval
mode), the autocast cache, the inputs, the gradients. What cannot be kept from happening: hooks that others registered on the model run
in these forwards as in any other.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probe.capture.arguments import by_name, with_replaced
from probe.capture.hooks import listening
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import main_tensor
from probe.capture.observers.root_call import RootCall, device_of
from probe.foreign.compiled import force_eager

PAST = "the forward was given past_key_values, which a second forward would change"


@dataclass(frozen=True, slots=True)
class Replayed:
    """One forward that was run again.

    Attributes:
        micro: Inputs and output, as heads are scored with.
        logits: What each head returned in its last call, by the head's name; heads that were not called are absent.
    """

    micro: MicroBatch
    logits: Mapping[str, Tensor]


def run_again(call: RootCall, replaced: Mapping[str, Tensor], *, heads: Mapping[str, nn.Module], compiled: bool = False) -> Replayed | str:
    """Run the root's forward with some of its inputs replaced, without gradients and in eval mode. No sync but the model's own.

    Takes the memory of an evaluation forward, and holds the logits of every head until the result is dropped.

    Args:
        call: The training forward.
        replaced: New values by input name; without any it runs as it was.
        heads: The heads to listen to, by name.
        compiled: Whether something of the model is compiled; it is run eagerly here.

    Returns:
        What came out, or the reason why it cannot be run with these inputs.

    Raises:
        Exception: What the model raises; everything has been restored by then.
    """
    put = with_replaced(call.module.forward, call.args, call.kwargs, replaced)
    if isinstance(put, str):
        return put
    args, kwargs = put
    if by_name(call.module.forward, tuple(args), kwargs).get("past_key_values") is not None:
        return PAST
    if _takes(call.module, "use_cache") and "use_cache" not in by_name(call.module.forward, tuple(args), {}):
        kwargs["use_cache"] = False
    logits: dict[str, Tensor] = {}

    def hear(name: str, output: Any) -> None:
        found = main_tensor(output)
        if found is not None:
            logits[name] = found

    with as_it_was(call, compiled=compiled), listening(heads, hear):
        output = call.module(*args, **kwargs)
    return Replayed(MicroBatch(call.micro.index, call.micro.batch, by_name(call.module.forward, tuple(args), kwargs), output), logits)


@contextmanager
def as_it_was(call: RootCall, *, compiled: bool) -> Iterator[None]:
    """Open a stretch without gradients, in eval mode and under the call's autocast, after which everything is as before."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_generators_kept(call))
        if compiled:
            stack.enter_context(force_eager())
        stack.enter_context(_autocast_of(call))
        stack.enter_context(_in_eval_mode(call.module))
        yield


def _takes(root: nn.Module, name: str) -> bool:
    """Tell whether the root's forward has a parameter of this name; of a PEFT model, the forward of the model inside."""
    inside = getattr(root, "get_base_model", None)
    models = [root, inside()] if callable(inside) and hasattr(root, "peft_config") else [root]
    for model in models:
        try:
            if name in inspect.signature(model.forward).parameters:
                return True
        except (TypeError, ValueError):
            continue
    return False


@contextmanager
def _in_eval_mode(root: nn.Module) -> Iterator[None]:
    """Set every module to eval mode, flag by flag: ``eval()`` and ``train()`` may be overridden, and not all modules need be training."""
    training = [module for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _autocast_of(call: RootCall) -> Iterator[None]:
    """Run under the autocast that the call ran under, whatever is on now, and leave no cast weight without gradient in its cache."""
    kind = device_of(call.module).type
    if call.autocast is None and not torch.is_autocast_enabled(kind):
        yield
        return
    try:
        with torch.autocast(kind, dtype=call.autocast, enabled=call.autocast is not None):
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _generators_kept(call: RootCall) -> Iterator[None]:
    """Restore the state of every random generator: Python's, NumPy's, torch's on the CPU and on each accelerator that the model is on."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    restore = [_generator_of(device) for device in _accelerators(call)]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        for put_back in restore:
            put_back()


def _generator_of(device: torch.device) -> Callable[[], None]:
    """Note the state of a device's generator (kept on the host: no sync on CUDA), and return what puts it back."""
    backend = getattr(torch, device.type)
    if device.type == "mps":
        state = backend.get_rng_state()
        return lambda: backend.set_rng_state(state)
    state = backend.get_rng_state(device)
    return lambda: backend.set_rng_state(state, device)


def _accelerators(call: RootCall) -> set[torch.device]:
    inputs = (value for value in call.micro.inputs.values() if isinstance(value, Tensor))
    devices = {tensor.device for tensor in (*call.module.parameters(), *call.module.buffers(), *inputs)}
    return {device for device in devices if device.type != "cpu" and hasattr(getattr(torch, device.type, None), "get_rng_state")}
