"""What the Trainer does not hand to callbacks: transformers' inner names, in one place.

Checked on transformers 4.46.3, 4.57.6 and 5.23.0: ``CallbackHandler.on_train_begin``, ``CallbackHandler.callbacks``,
``Trainer.callback_handler``, ``Trainer.model_wrapped``, ``Trainer.accelerator`` (``.sync_gradients``, ``.scaler``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor, nn
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from probe.foreign.patching import wrap_class_method
from probe.foreign.torch_private import gradients_unscaled, loss_scale


def before_every_train_begin(see: Callable[[CallbackHandler], None]) -> Callable[[], None]:
    """Call ``see(handler)`` before the callbacks of any Trainer hear that training begins. Returns a function that undoes it."""

    def wrapper(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        see(instance)
        return wrapped(*args, **kwargs)

    return wrap_class_method(CallbackHandler, "on_train_begin", wrapper)


def running_trainer(handler: CallbackHandler | None = None, *, callback: TrainerCallback | None = None) -> Any | None:
    """Return the Trainer below whose call this is, found on the stack of frames; ``None`` if there is none.

    Args:
        handler: The Trainer must own this handler.
        callback: The Trainer must own this callback.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        owned = getattr(candidate, "callback_handler", None)
        if isinstance(owned, CallbackHandler) and hasattr(candidate, "training_step"):
            if handler is not None and owned is handler:
                return candidate
            if callback is not None and any(known is callback for known in owned.callbacks):
                return candidate
        frame = frame.f_back
    return None


def insert_first(handler: CallbackHandler, callback: TrainerCallback) -> None:
    """Put a callback before all others, in a new list: a loop over the old one that is under way goes on undisturbed."""
    handler.callbacks = [callback, *handler.callbacks]


def add_last(handler: CallbackHandler, callback: TrainerCallback) -> None:
    """Put a callback behind all others, in a new list."""
    handler.callbacks = [*handler.callbacks, callback]


def remove_callback(handler: CallbackHandler, callback: TrainerCallback) -> None:
    """Take one callback out, by identity, in a new list."""
    handler.callbacks = [known for known in handler.callbacks if known is not callback]


def outermost_module(trainer: Any) -> nn.Module:
    """Return what the Trainer calls in training: the DDP, FSDP or compile wrapper, or the model itself."""
    wrapped = getattr(trainer, "model_wrapped", None)
    return wrapped if isinstance(wrapped, nn.Module) else trainer.model


def gradients_complete(trainer: Any) -> bool:
    """Tell whether the micro-batch just done was the last of its step, so that gradients are summed over all of them (and all ranks)."""
    return bool(getattr(trainer.accelerator, "sync_gradients", True))


def gradient_scale(trainer: Any) -> Tensor | None:
    """Return the factor that fp16 training has multiplied gradients with (0-dim, on the device), or ``None``."""
    return loss_scale(getattr(trainer.accelerator, "scaler", None))


def still_scaled(trainer: Any) -> bool:
    """Tell whether gradients still carry the factor of fp16 training: clipping divides it out, and else only the optimizer's step does."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return loss_scale(scaler) is not None and not gradients_unscaled(scaler)


def processing_class(trainer: Any) -> Any | None:
    """Return the Trainer's processing class (a tokenizer, a processor, …), or ``None``."""
    return getattr(trainer, "processing_class", None)
