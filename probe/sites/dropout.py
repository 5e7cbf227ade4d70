"""Finding dropout: modules that are dropout layers, and modules that call dropout as a function with a probability of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from probe.sites.configs import all_configs, fields_of

_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_UNUSED = ("classifier", "summary")  # heads that a model may have beside the one that is trained


def dropout_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that drop out with a probability above 0 while they are in training mode, each once.

    Dropout layers of torch; and modules with an attribute such as ``attention_dropout = 0.1``: transformers' layers hand that and their
    own ``training`` to a function. Whether an attribute is used cannot be seen from outside.
    """
    return [module for module in model.modules() if _drops(module)]


def config_dropout(model: nn.Module) -> float | None:
    """Return the largest dropout probability that a model's configs name; ``None`` if they name none."""
    named = [float(value) for config in all_configs(model) for name, value in fields_of(config) if _is_rate(name, value)]
    return max(named, default=None)


def _drops(module: nn.Module) -> bool:
    if isinstance(module, _LAYERS):
        return bool(module.p > 0)
    # The name first: of the thousands of attributes of a model few are rates, and this runs in every sampled step.
    return any("drop" in name and _is_rate(name, value) and value > 0 for name, value in vars(module).items())


def _is_rate(name: str, value: Any) -> bool:
    says = ("dropout" in name or name.endswith("_pdrop")) and not name.startswith(_UNUSED)
    return says and isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
