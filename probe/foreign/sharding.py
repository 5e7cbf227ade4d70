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
