"""How to tell that a parameter is only this rank's share of it.

Checked on torch 2.13.0: FSDP2's parameters are of class ``DTensor`` (told by its name: its module moved between torch 2.4 and 2.5);
FSDP1's are ``FlatParameter`` or views of one, marked by the private ``_is_flat_param`` or ``_fsdp_flattened``. DeepSpeed's ZeRO-3
marks its own with ``ds_id`` (deepspeed 0.19).
"""

from __future__ import annotations

from torch import Tensor

_MARKS = ("_is_flat_param", "_fsdp_flattened", "ds_id")


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether a parameter is a share of a larger one that other ranks hold the rest of."""
    return any(c.__name__ == "DTensor" for c in type(parameter).__mro__) or any(hasattr(parameter, mark) for mark in _MARKS)


def is_whole(parameter: Tensor) -> bool:
    """Tell whether a parameter can be computed with here and now: it is all there, be it only while a forward has gathered it.

    FSDP2 puts plain tensors in the place of DTensors while gathered; FSDP1's gathered weights have their own shape, its shares are
    vectors; ZeRO-3's are empty unless gathered.
    """
    if any(c.__name__ == "DTensor" for c in type(parameter).__mro__):
        return False
    return parameter.numel() > 0 and (parameter.dim() > 1 or not is_sharded(parameter))
