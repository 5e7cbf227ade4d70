"""What a loss audit goes by: the numbers of one step, what is known of its Trainer and model, and what a cause is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from probe.assemble.loss_terms import Expectation
from probe.foreign.trainer_loss import LossSettings
from probe.sites.reduction import Reduction

AGREEMENT = 1e-3
"""How far the ratio may be from 1 without a cause, relative (more for losses in half precision, see ``Figures.tolerance``)."""

Kind = Literal[
    "masked",
    "nonfinite",
    "accumulation",
    "items",
    "ranks",
    "shift",
    "padding",
    "smoothing",
    "text",
    "audio",
    "auxiliary",
    "loss_function",
    "forward",
    "override",
    "unexplained",
    "log",
]
"""What a cause is about.

``masked``: no label to learn from. ``nonfinite``: NaN or Inf. ``accumulation``, ``ranks``: a factor of their number. ``items``:
``num_items_in_batch`` is another number than the labels', or does not reach the loss. ``shift``: labels lie over the wrong logits.
``padding``: labels at padding are in the loss, or left out of it although they are not -100. ``smoothing``: label smoothing is missing,
or unasked for. ``text``, ``audio``: the loss of these tokens is not in the loss. ``auxiliary``: the auxiliary loss weighs too much.
``loss_function``, ``forward``, ``override``: the user's loss function, the model's own loss, or an overridden method of the Trainer
makes another loss. ``unexplained``: nothing of the above. ``log``: the log says another number than what was backpropagated.
"""

EPSILONS = {"float32": 0.0, "float64": 0.0, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Half a unit in the last place or more, relative, by which a loss of this dtype may be rounded."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One step's numbers, and what is known of its Trainer and its model.

    Attributes:
        loss: What was backpropagated; ``None`` if that is NaN or Inf.
        expectation: What was expected.
        settings: The Trainer's.
        reduction: The model's.
        dtype: Of the loss, by which it is rounded.
        own: What the model's own output loss would have come to, divided and multiplied as the Trainer does; ``None`` without.
        unnamed: Text labels came under another name than ``labels``, which the Trainer does not look for.
        nonfinite: Micro-batches with a NaN or Inf loss, and the index of the first.
        masked: Micro-batches without a single label to learn from.
        logged: The Trainer's log of this very step.
    """

    loss: float | None
    expectation: Expectation
    settings: LossSettings
    reduction: Reduction
    dtype: str = "float32"
    own: float | None = None
    unnamed: bool = False
    nonfinite: int = 0
    first_nonfinite: int = 0
    masked: int = 0
    logged: float | None = None

    @property
    def expected(self) -> float | None:
        """What was expected; ``None`` if there is no label."""
        return self.expectation.value()

    @property
    def tolerance(self) -> float:
        """Relative difference within which loss and expectation agree: rounding of the loss itself, and three standard errors."""
        error = 3 * self.expectation.standard_error() / self.expected if self.expected else 0.0
        return max(AGREEMENT, EPSILONS.get(self.dtype, 0.0), error)

    @property
    def off(self) -> bool:
        """Whether there is something to explain."""
        return self.loss is not None and self.expected is not None and not near(self.loss, self.expected, self.tolerance)


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a loss is off: what it is about, and one sentence."""

    kind: Kind
    sentence: str


def near(one: float, other: float, relative: float, *, rounding: float = 0.0) -> bool:
    """Tell whether two numbers agree, relative to the second or within an absolute ``rounding``."""
    return abs(one - other) <= max(relative * abs(other), rounding)
