"""The voice cloner of docs/examples and what can be wrong with it, each in a few lines, with the verdict that is right.

Needs ``docs/examples`` on the path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from clone_voice import AUDIO_IN, Clip, CloningCollator, CloningDataset, VoiceCloner
from probe.records import Use


class DetachedProjector(VoiceCloner):
    """Nothing that is learnt reaches encoder and projector: both stay as they were drawn."""

    def reference(self, input_features: Tensor) -> Tensor:
        """Cut the gradient."""
        return super().reference(input_features).detach()


class SilencedProjector(VoiceCloner):
    """The projector's output is multiplied by 0, as by a gate that never opened."""

    def reference(self, input_features: Tensor) -> Tensor:
        """Return zeros that depend on the projector as far as autograd can tell."""
        return super().reference(input_features) * 0.0


class ConstantEncoder(VoiceCloner):
    """The encoder's last norm has weights of 0 that do not train: its output is the same for every clip and frame."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        nn.init.zeros_(self.audio_tower.layer_norm.weight).requires_grad_(False)


class AnyReference(CloningDataset):
    """Each target with one clip drawn from all speakers as its reference."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        super().__init__(clips)
        rng = np.random.default_rng(7)
        self.pairs = [(clips[rng.integers(len(clips))], target) for _, target in self.pairs]


class TargetAsReference(CloningDataset):
    """Each target with itself as its reference."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        super().__init__(clips)
        self.pairs = [(target, target) for _, target in self.pairs]


class ReferenceDropped(CloningCollator):
    """A flag of the collator leaves out the reference: its features, and the tokens that stand for them."""

    def __call__(self, pairs: Sequence[tuple[Clip, Clip]]) -> dict[str, Tensor]:
        """Return text and target only."""
        batch = super().__call__(pairs)
        kept_S = batch["input_ids"][0] != AUDIO_IN
        del batch["input_features"]
        return {name: tensor[:, kept_S] for name, tensor in batch.items()}


@dataclass(frozen=True)
class Variant:
    """One way to train the cloner.

    Attributes:
        name: What to call it.
        what: What is done, in a few words.
        expected: The right verdict, ``None`` where there is nothing to have one on.
        steps: Optimizer steps until it is judged: what is cut off shows at once; what is read off a target takes longest to learn.
        model, data, collator: What it trains.
    """

    name: str
    what: str
    expected: Use | None
    steps: int = 400
    model: Callable[..., VoiceCloner] = VoiceCloner
    data: Callable[[Sequence[Clip]], CloningDataset] = CloningDataset
    collator: CloningCollator = field(default_factory=CloningCollator)


VARIANTS = (
    Variant("healthy", "as in docs/examples/clone_voice.py", "used"),
    Variant("other-speaker", "the reference is a clip of any speaker", "ignored", data=AnyReference),
    Variant("target-as-reference", "the reference is the target clip itself", "leaked", 600, data=TargetAsReference),
    Variant("reference-dropped", "the collator leaves the reference out", None, 100, collator=ReferenceDropped()),
    Variant("projector-detached", "`.detach()` behind the projector", "ignored", model=DetachedProjector),
    Variant("projector-silenced", "the projector's output times 0", "ignored", 100, model=SilencedProjector),
    Variant("encoder-constant", "the encoder's output is constant", "ignored", 100, model=ConstantEncoder),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
