"""What one would use instead of the probe, each as its documentation says, and observing every step."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.debug_utils import DebugUnderflowOverflow

from probe.sites.discovery import discover


class Companion:
    """What accompanies a training; this one is nothing.

    The order: :meth:`open` before the Trainer is made, :meth:`begun` when its ``train()`` stands before the first step,
    :meth:`before` and :meth:`after` round each step and outside its time, :meth:`close` when training has ended.
    """

    trainer: type[Trainer] = Trainer
    warm_up = 1
    """Steps before the first that is like all others: one makes the optimizer's states."""

    def open(self, model: nn.Module) -> None:
        """See the model before its Trainer is made."""

    def callbacks(self) -> Sequence[TrainerCallback]:
        """Return the callbacks to train with."""
        return ()

    def equip(self, trainer: Trainer) -> None:
        """See the Trainer before it trains."""

    def begun(self) -> None:
        """See that training has begun."""

    def before(self) -> None:
        """Prepare for a step, outside its time."""

    def after(self) -> None:
        """Clean up after a step, outside its time."""

    def troubles(self) -> list[str]:
        """Return what makes its figures worthless."""
        return []

    def close(self) -> None:
        """End."""


class Kept(TrainerCallback):
    """Lets go of what was kept for the callbacks when the step has ended."""

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget."""
        self._forget()


class ReturningTrainer(Trainer):
    """The usual override: the model returns hidden states and attention weights, and the Trainer keeps them for its callbacks."""

    kept: Any = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Ask the model for all it returns."""
        asked = {**inputs, "output_hidden_states": True, "output_attentions": True}
        loss, self.kept = super().compute_loss(model, asked, return_outputs=True, **kwargs)
        return (loss, self.kept) if return_outputs else loss

    def forget(self) -> None:
        """Let go of the outputs."""
        self.kept = None


class Returned(Companion):
    """Outputs returned by the model itself."""

    trainer = ReturningTrainer

    def equip(self, trainer: Trainer) -> None:
        """Free the outputs at the end of the step, as a callback that has read them would."""
        assert isinstance(trainer, ReturningTrainer)
        trainer.add_callback(Kept(trainer.forget))


class ThroughTrainer(Trainer):
    """Calls something else in the place of the model, which calls the model."""

    through: Any = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the loss be computed of what the go-between returns."""
        return super().compute_loss(self.through or model, inputs, *args, **kwargs)


class WandbWatch(Companion):
    """``wandb.watch(model, log="all", log_freq=1)`` in an offline run, and one ``log`` a step, which writes the histograms."""

    def __init__(self) -> None:
        import wandb  # an optional dependency; not before its turn, so that nothing of it runs beside the others

        self._folder = tempfile.TemporaryDirectory(prefix="wandb-benchmark-")
        settings = wandb.Settings(silent=True, quiet=True, console="off", x_disable_stats=True)
        self._run = wandb.init(mode="offline", dir=self._folder.name, project="benchmark", settings=settings)
        self._model: nn.Module | None = None

    def open(self, model: nn.Module) -> None:
        """Watch."""
        self._model = model
        self._run.watch(model, log="all", log_freq=1)

    def callbacks(self) -> Sequence[TrainerCallback]:
        """Return what logs at the end of a step."""
        run = self._run

        class Log(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                run.log({"train/global_step": state.global_step})

        return (Log(),)

    def close(self) -> None:
        """Unwatch and end the run."""
        self._run.unwatch(self._model)
        self._run.finish()
        self._folder.cleanup()


class Traced(Companion):
    """nnsight: the forward in a trace whose cache takes the output of every module, left on its device."""

    trainer = ThroughTrainer

    def __init__(self) -> None:
        from nnsight import NNsight  # an optional dependency; see above

        self._wrap = NNsight
        self._traced: Any = None
        self.cache: Any = None

    def open(self, model: nn.Module) -> None:
        """Wrap the model."""
        self._traced = self._wrap(model)

    def equip(self, trainer: Trainer) -> None:
        """Let the Trainer call the trace, and free the cache at the end of the step."""
        assert isinstance(trainer, ThroughTrainer)
        trainer.through = self._forward
        trainer.add_callback(Kept(self._forget))

    def _forward(self, **inputs: Any) -> Any:
        with self._traced.trace(**inputs) as tracer:
            cache = tracer.cache(device=None)
            outputs = self._traced.output.save()
        self.cache = cache
        return outputs

    def _forget(self) -> None:
        self.cache = None


class Recorded(Companion):
    """TorchLens: its sparse recorder, the lightest way it has, told to save the output of every operation of the forward."""

    trainer = ThroughTrainer

    def __init__(self) -> None:
        import torchlens  # an optional dependency; see above
        from torchlens.backends.torch import wrappers

        warnings.simplefilter("ignore", torchlens.errors.ScalarEscapeWarning)  # one a step, of transformers' own code
        self._record, self._wrappers = torchlens.record, wrappers
        self._model: nn.Module | None = None
        self.recording: Any = None

    def open(self, model: nn.Module) -> None:
        """Note the model."""
        self._model = model

    def equip(self, trainer: Trainer) -> None:
        """Let the Trainer call the recorder, and free the recording at the end of the step."""
        assert isinstance(trainer, ThroughTrainer)
        trainer.through = self._forward
        trainer.add_callback(Kept(self._forget))

    def before(self) -> None:
        """Let it wrap the functions of torch, which it does once in a process, so outside the time of a step."""
        self._wrappers.wrap_torch()

    def after(self) -> None:
        """Unwrap the functions of torch, which the plain Trainer has as they are."""
        self._wrappers.unwrap_torch()

    def _forward(self, **inputs: Any) -> Any:
        outputs, self.recording = self._record(self._model, None, inputs, default_op=True, return_output=True)
        return outputs

    def _forget(self) -> None:
        self.recording = None

    def close(self) -> None:
        """Leave torch as it was."""
        self._wrappers.unwrap_torch()


class Debugged(Companion):
    """transformers' ``DebugUnderflowOverflow``: the absolute smallest and largest value of what enters and leaves every module."""

    def open(self, model: nn.Module) -> None:
        """Register its hooks."""
        self._debug = DebugUnderflowOverflow(model)


class ByHand(Companion):
    """Forward hooks that print-style debugging writes: mean, std, min, max and NaN of the output, each read with ``.item()``.

    They stand on the modules that the probe observes.
    """

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, ...]] = {}
        self._handles: list[Any] = []

    def open(self, model: nn.Module) -> None:
        """Register the hooks."""
        for name, module in discover(model).modules.items():
            self._handles.append(module.register_forward_hook(lambda module, args, output, name=name: self._see(name, output)))

    def _see(self, name: str, output: Any) -> None:
        values = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", getattr(output, "logits", None))
        values = output[0] if values is None and isinstance(output, tuple) else values
        if isinstance(values, Tensor):
            x = values.detach().float()
            self.seen[name] = (x.mean().item(), x.std().item(), x.min().item(), x.max().item(), torch.isnan(x).any().item())

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


COMPETITORS: tuple[dict[str, Any], ...] = (
    {
        "name": "returned",
        "title": "`compute_loss` override: hidden states and attention weights returned, eager attention",
        "gives": "the tensors themselves; no numbers yet",
        "companion": Returned,
        "attention": "eager",
    },
    {
        "name": "by-hand",
        "title": "hand-written hooks with `.item()`",
        "gives": "mean, std, min, max, NaN of the outputs of the probe's sites",
        "companion": ByHand,
    },
    {
        "name": "underflow",
        "title": "transformers' `DebugUnderflowOverflow`",
        "gives": "smallest and largest absolute value of every module's weights, inputs and outputs",
        "companion": Debugged,
    },
    {
        "name": "wandb",
        "title": '`wandb.watch(log="all", log_freq=1)`, offline',
        "gives": "a histogram of every weight and gradient",
        "companion": WandbWatch,
        "apart": True,
    },
    {
        "name": "nnsight",
        "title": "nnsight, a trace with a cache of every module's output",
        "gives": "the tensors themselves; no numbers yet",
        "companion": Traced,
        "apart": True,
    },
    {
        "name": "torchlens",
        "title": "TorchLens, `record` of every operation of the forward",
        "gives": "the tensors themselves; no numbers yet (and other dropout masks: it seeds the generator)",
        "companion": Recorded,
        "apart": True,
    },
)
