"""The one place that touches transformers' attention registries: which kernels layers look up, and how to stand round them for a while.

Checked on transformers 4.46.3, 4.48.3, 4.57.6 and 5.23.0. A layer looks its kernel up by ``config._attn_implementation`` each time it runs:

* 4.48 and later: ``ALL_ATTENTION_FUNCTIONS[name]`` or ``.get_interface(name, …)``, a dictionary (to 4.50) or an ``AttentionInterface``
  whose ``_local_mapping`` goes before its class's ``_global_mapping``; some modeling modules hold an instance of their own;
* 4.46, and some classes later: ``_flash_attention_forward`` imported into the modeling module. transformers' own flash attention, in
  ``transformers.integrations.flash_attention``, calls a function of that name, too.

So every place is an entry of some dictionary. Entries are replaced, never functions: who holds a function already is not reached.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import modeling_flash_attention_utils, modeling_utils

#: "flash": transformers' ``_flash_attention_forward``; "flex": its ``flex_attention_forward``; "paged": one that owns a cache;
#: "interface": somebody else's, called as ``AttentionInterface`` documents it.
Convention = Literal["flash", "flex", "paged", "interface"]

_FLASH = "_flash_attention_forward"
_SEEN = ("eager", "sdpa")  # made of torch functions
_ABSENT = object()
_LOCK = threading.Lock()  # the dictionaries belong to the process: two models may train in two threads


@dataclass(frozen=True, slots=True)
class Kernel:
    """An attention kernel: the name under which layers look it up, how it is called, and what is called."""

    name: str
    convention: Convention
    function: Callable[..., Any]


#: ``run(kernel, args, kwargs)`` must call the kernel's function with these arguments once, and return its very result.
Run = Callable[[Kernel, tuple[Any, ...], dict[str, Any]], Any]


class WatchedKernel:
    """What stands in a kernel's place while at least one window is open."""

    def __init__(self, kernel: Kernel, run: Run, table: dict[str, Any], key: str) -> None:
        """Remember what stood in ``table`` under ``key``; nothing is replaced yet."""
        functools.update_wrapper(self, kernel.function)
        self.kernel = kernel
        self.windows = 0
        self.table, self.key = table, key
        self.before = table.get(key, _ABSENT)
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel."""
        return self._run(self.kernel, args, kwargs)


@contextmanager
def watched_kernels(layers: Iterable[nn.Module], model: nn.Module, run: Run) -> Iterator[None]:
    """Let ``run`` stand round the kernels that these layers look up, for the length of the context.

    Only kernels that are not made of torch functions; those are looked up by every model and thread of the process, so ``run`` must tell
    its own calls from others'. Contexts may nest, also across threads in any order: the first one's ``run`` serves all, and the last to
    end puts every entry back, or leaves it alone if somebody else has replaced it meanwhile.

    Args:
        layers: Attention layers.
        model: The model they are in: its configs tell what a layer without a config of its own looks up.
        run: See :data:`Run`; the same function for all contexts.
    """
    standing: list[WatchedKernel] = []
    try:
        with _LOCK:
            for table, key, kernel in _places(layers, model):
                standing.append(_stand_in(table, key, kernel, run))
        yield
    finally:
        with _LOCK:
            for watched in standing:
                _stand_down(watched)


def _stand_in(table: dict[str, Any], key: str, kernel: Kernel, run: Run) -> WatchedKernel:
    watched = table.get(key)
    if not isinstance(watched, WatchedKernel):
        watched = WatchedKernel(kernel, run, table, key)
        table[key] = watched
    watched.windows += 1
    return watched


def _stand_down(watched: WatchedKernel) -> None:
    watched.windows -= 1
    if watched.windows or watched.table.get(watched.key) is not watched:
        return
    if watched.before is _ABSENT:
        del watched.table[watched.key]
    else:
        watched.table[watched.key] = watched.before


def implementations(module: nn.Module) -> tuple[str, ...]:
    """Return the names under which the module's own config lets layers look up a kernel; nothing without a config that names one."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return tuple({name, name.removeprefix("paged|")}) if isinstance(name, str) else ()


def _places(layers: Iterable[nn.Module], model: nn.Module) -> list[tuple[dict[str, Any], str, Kernel]]:
    """Return each place once: the dictionary, the key, and the kernel that is found there now."""
    layers = list(layers)
    shared = () if all(map(implementations, layers)) else tuple({name for part in model.modules() for name in implementations(part)})
    found: dict[tuple[int, str], tuple[dict[str, Any], str, Kernel]] = {}
    for layer_class, name in {(type(layer), name) for layer in layers for name in implementations(layer) or shared}:
        for table, key, kernel in _places_of(layer_class, name):
            found.setdefault((id(table), key), (table, key, kernel))
    return list(found.values())


def _places_of(layer_class: type[nn.Module], name: str) -> Iterator[tuple[dict[str, Any], str, Kernel]]:
    spaces = [*_namespaces(layer_class), _globals("transformers.integrations.flash_attention")]
    for registry in _registries(spaces):
        function = _plain(registry.get(name))
        if function is None:
            continue
        spaces.append(getattr(inspect.unwrap(_unbound(function)), "__globals__", {}))
        convention = _convention(function)
        if convention is not None:
            yield getattr(registry, "_local_mapping", registry), name, Kernel(name, convention, function)
    own = getattr(modeling_flash_attention_utils, _FLASH, _ABSENT)
    for space in spaces:
        if name not in _SEEN and _plain(space.get(_FLASH)) is own:
            yield space, _FLASH, Kernel(name, "flash", own)


def _convention(function: Any) -> Convention | None:
    """Return how a registered function is called; ``None`` if what it calls is seen anyway."""
    if function is _own("sdpa_attention", "sdpa_attention_forward"):
        return None
    flash = _own("flash_attention", "flash_attention_forward")
    if _unbound(function) is flash and _FLASH in getattr(flash, "__globals__", {}):
        return None
    if "paged" in getattr(_unbound(function), "__module__", ""):
        return "paged"
    return "flex" if function is _own("flex_attention", "flex_attention_forward") else "interface"


def _own(module: str, name: str) -> Any:
    """Return transformers' own function, if its module is loaded (it is, where the function is registered)."""
    return getattr(sys.modules.get(f"transformers.integrations.{module}"), name, _ABSENT)


def _unbound(function: Any) -> Any:
    return function.func if isinstance(function, functools.partial) else function


def _plain(function: Any) -> Any:
    return function.kernel.function if isinstance(function, WatchedKernel) else function


def _namespaces(layer_class: type[nn.Module]) -> Iterator[dict[str, Any]]:
    """Yield the globals of the modules in which the layer's classes, and its forward if somebody replaced it, were written."""
    for base in layer_class.__mro__:
        if base.__module__.split(".")[0] not in ("builtins", "torch"):
            yield _globals(base.__module__)
    yield getattr(inspect.unwrap(layer_class.forward), "__globals__", {})


def _globals(module: str) -> dict[str, Any]:
    loaded = sys.modules.get(module)
    return {} if loaded is None else vars(loaded)


def _registries(spaces: Iterable[dict[str, Any]]) -> list[Any]:
    """Return every registry that these globals name, and transformers' own, each once."""
    found = {id(own): own for own in (getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None),) if own is not None}
    for space in spaces:
        for name, value in list(space.items()):
            named = name == "ALL_ATTENTION_FUNCTIONS" and isinstance(value, dict)
            if named or any(base.__name__ == "AttentionInterface" for base in type(value).__mro__):
                found[id(value)] = value
    return list(found.values())
