"""The places where layers look attention kernels up: which are watched, and that every entry is put back as it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import nn
from transformers import modeling_flash_attention_utils, modeling_utils

from probe.capture.kernels import run_kernel
from probe.capture.tap import AttentionTap
from probe.foreign.attention_kernels import Kernel, WatchedKernel, implementations, watched_kernels

OWN = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)
HAS_REGISTRY = pytest.mark.skipif(OWN is None, reason="this transformers has no registry of attention kernels")
FLASH = "_flash_attention_forward"


def run(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kernel.name, kernel.convention, kernel.function(*args, **kwargs)


def table(registry: Any) -> dict[str, Any]:
    return getattr(registry, "_local_mapping", registry)


class Registry(dict[str, Any]):
    """As ``AttentionInterface``: entries of the instance go before those of the class."""

    _global_mapping: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self._local_mapping: dict[str, Any] = {}

    def get(self, name: str, default: Any = None) -> Any:
        return self._local_mapping.get(name, self._global_mapping.get(name, default))


Registry.__name__ = "AttentionInterface"


def theirs(*args: Any, **kwargs: Any) -> str:
    return "theirs"


@pytest.fixture
def modeling(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A modeling module with a layer class, two registries of its own, and transformers' flash attention among its globals."""
    module = types.ModuleType("modeling_theirs")
    monkeypatch.setitem(sys.modules, "modeling_theirs", module)
    monkeypatch.setattr(Registry, "_global_mapping", {"theirs": theirs})
    module.OWN_FUNCTIONS = Registry()  # type: ignore[attr-defined]
    module.ALL_ATTENTION_FUNCTIONS = {"theirs": theirs, "other": theirs}  # type: ignore[attr-defined]
    setattr(module, FLASH, modeling_flash_attention_utils._flash_attention_forward)
    exec("from torch import nn\nclass Layer(nn.Module):\n    def forward(self, x):\n        return x", vars(module))
    return module


def layer(modeling: types.ModuleType, name: str | None) -> nn.Module:
    made: nn.Module = modeling.Layer()
    if name is not None:
        made.config = types.SimpleNamespace(_attn_implementation=name)  # type: ignore[assignment]
    return made


def state(modeling: types.ModuleType) -> Any:
    """Return all that may be replaced, with the order of the keys."""
    own = () if OWN is None else tuple(table(OWN).items())
    integration = getattr(sys.modules.get("transformers.integrations.flash_attention"), FLASH, None)
    local = (tuple(modeling.OWN_FUNCTIONS._local_mapping.items()), tuple(Registry._global_mapping.items()))
    return own, integration, local, tuple(modeling.ALL_ATTENTION_FUNCTIONS.items()), getattr(modeling, FLASH)


def test_every_place_is_watched_and_put_back(modeling: types.ModuleType) -> None:
    """Registries of the modeling module, of any kind, and flash attention in its globals are replaced inside, and as before after."""
    before = state(modeling)
    used = layer(modeling, "theirs")
    with watched_kernels([used], used, run):
        assert modeling.OWN_FUNCTIONS.get("theirs")(1) == ("theirs", "interface", "theirs")
        assert modeling.ALL_ATTENTION_FUNCTIONS["theirs"]() == ("theirs", "interface", "theirs")
        assert modeling.ALL_ATTENTION_FUNCTIONS["other"] is theirs
        assert Registry._global_mapping == {"theirs": theirs}
        watched = getattr(modeling, FLASH)
        assert isinstance(watched, WatchedKernel)
        assert (watched.kernel.convention, watched.kernel.function) == ("flash", before[-1])
        assert watched.__name__ == FLASH
    assert state(modeling) == before
    modeling.OWN_FUNCTIONS._local_mapping["theirs"] = print
    before = state(modeling)
    with pytest.raises(ZeroDivisionError), watched_kernels([used], used, run):
        assert state(modeling) != before
        raise ZeroDivisionError
    assert state(modeling) == before


@pytest.mark.parametrize("name", ["eager", "sdpa", "missing", None])
def test_only_kernels_in_use_that_nothing_else_sees_are_watched(name: str | None, modeling: types.ModuleType) -> None:
    """For eager, SDPA, a name that no registry knows and no name at all, every registry stays as it is."""
    before = state(modeling)
    used = layer(modeling, name)
    with watched_kernels([used], used, run):
        now = state(modeling)
        assert now[0] == before[0]
        assert now[2:4] == before[2:4]
        assert (now == before) == (name != "missing")  # which may be a class that calls flash attention by itself
    assert state(modeling) == before


def test_a_layer_without_a_config_uses_what_the_models_configs_name(modeling: types.ModuleType) -> None:
    """Where the attention layer has no config, those of the model tell its kernel; where it has one, only its own does."""
    model = nn.Module()
    model.config = types.SimpleNamespace(_attn_implementation="theirs")
    model.inner = layer(modeling, None)
    with watched_kernels([model.inner], model, run):
        assert isinstance(modeling.ALL_ATTENTION_FUNCTIONS["theirs"], WatchedKernel)
    model.inner = layer(modeling, "sdpa")
    with watched_kernels([model.inner], model, run):
        assert modeling.ALL_ATTENTION_FUNCTIONS["theirs"] is theirs
    assert implementations(layer(modeling, "paged|theirs")) in (("paged|theirs", "theirs"), ("theirs", "paged|theirs"))


def test_windows_nest_in_any_order(modeling: types.ModuleType) -> None:
    """Two windows, closed in the order in which they were opened, share what stands in; the last puts the entries back."""
    before = state(modeling)
    used = layer(modeling, "theirs")
    first, second = (watched_kernels([used], used, run) for _ in range(2))
    first.__enter__()
    inside = state(modeling)
    second.__enter__()
    assert state(modeling) == inside
    first.__exit__(None, None, None)
    assert state(modeling) == inside
    assert modeling.ALL_ATTENTION_FUNCTIONS["theirs"]() == ("theirs", "interface", "theirs")
    second.__exit__(None, None, None)
    assert state(modeling) == before


def test_windows_of_several_threads(modeling: types.ModuleType) -> None:
    """Windows that open and close in several threads at once leave every entry as it was."""
    before = state(modeling)
    used = layer(modeling, "theirs")
    seen: list[Any] = []

    def work() -> None:
        for _ in range(200):
            with watched_kernels([used], used, run):
                seen.append(modeling.ALL_ATTENTION_FUNCTIONS["theirs"]())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    assert seen == [("theirs", "interface", "theirs")] * 800
    assert state(modeling) == before


def test_two_windows_that_open_at_the_same_moment(modeling: types.ModuleType) -> None:
    """A window that opens while another is just opening shares its stand-in: closing one leaves the other's in place."""
    together = threading.Barrier(2, timeout=0.3)

    class Meeting(dict[str, Any]):
        def __setitem__(self, name: str, value: Any) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait()
            time.sleep(0.0 if threading.current_thread() is threading.main_thread() else 0.1)
            super().__setitem__(name, value)

    def work() -> None:
        with watched_kernels([used], used, run):
            pass

    modeling.ALL_ATTENTION_FUNCTIONS = Meeting(theirs=theirs)  # type: ignore[attr-defined]
    used = layer(modeling, "theirs")
    thread = threading.Thread(target=work)
    thread.start()
    with watched_kernels([used], used, run):
        thread.join()
        assert isinstance(modeling.ALL_ATTENTION_FUNCTIONS["theirs"], WatchedKernel)
    assert modeling.ALL_ATTENTION_FUNCTIONS["theirs"] is theirs


def test_an_entry_that_somebody_replaced_meanwhile_is_left_alone(modeling: types.ModuleType) -> None:
    """What a model registers while the window is open stays when it closes."""
    used = layer(modeling, "theirs")
    with watched_kernels([used], used, run):
        modeling.ALL_ATTENTION_FUNCTIONS["theirs"] = print
    assert modeling.ALL_ATTENTION_FUNCTIONS["theirs"] is print


def test_what_fails_while_it_opens_is_undone(modeling: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one place cannot be replaced, those before it are put back and the error is the caller's."""
    before = state(modeling)

    class ReadOnly(dict[str, Any]):
        def __setitem__(self, name: str, value: Any) -> None:
            raise PermissionError(name)

    monkeypatch.setitem(vars(modeling), "ALL_ATTENTION_FUNCTIONS", ReadOnly(theirs=theirs))
    used = layer(modeling, "theirs")
    with pytest.raises(PermissionError), watched_kernels([used], used, run):
        pass
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "modeling_theirs", modeling)
    assert modeling.OWN_FUNCTIONS._local_mapping == {}
    assert getattr(modeling, FLASH) is before[-1]


def test_a_replaced_forward_brings_its_own_globals(modeling: types.ModuleType) -> None:
    """A forward, or a registered kernel, that was written elsewhere is looked through to the module it was written in."""
    elsewhere = types.ModuleType("elsewhere")
    elsewhere.ALL_ATTENTION_FUNCTIONS = {"theirs": theirs}  # type: ignore[attr-defined]
    exec("def forward(self, x):\n    return x", vars(elsewhere))
    used = layer(modeling, "theirs")

    @functools.wraps(elsewhere.forward)
    def outer(*args: Any) -> Any:
        return elsewhere.forward(*args)

    type(used).forward = outer  # type: ignore[method-assign]
    with watched_kernels([used], used, run):
        assert isinstance(elsewhere.ALL_ATTENTION_FUNCTIONS["theirs"], WatchedKernel)
    assert elsewhere.ALL_ATTENTION_FUNCTIONS["theirs"] is theirs
    third = types.ModuleType("third")
    exec(f"def kernel(*args, **kwargs):\n    return {FLASH}", vars(third))
    setattr(third, FLASH, getattr(modeling, FLASH))
    modeling.ALL_ATTENTION_FUNCTIONS["theirs"] = third.kernel
    with watched_kernels([used], used, run):
        assert isinstance(getattr(third, FLASH), WatchedKernel)
    assert getattr(third, FLASH) is getattr(modeling, FLASH)


@HAS_REGISTRY
def test_transformers_own_registry(modeling: types.ModuleType) -> None:
    """Flash attention is watched where it is called, flex in the registry, paged kernels by name; SDPA not at all."""
    before = state(modeling)
    integration = sys.modules["transformers.integrations.flash_attention"]
    for name in ("flash_attention_2", "flex_attention", "sdpa"):
        used = layer(modeling, name)
        with watched_kernels([used], used, run):
            assert isinstance(getattr(integration, FLASH), WatchedKernel) == (name != "sdpa")
            assert isinstance(OWN[name], WatchedKernel) == (name == "flex_attention")
            if name == "flex_attention":
                assert OWN[name].kernel.convention == "flex"
        assert state(modeling) == before
    for name in [name for name in OWN if "paged" in name]:
        used = layer(modeling, name)
        with watched_kernels([used], used, run):
            assert OWN[name].kernel.convention == "paged"
        assert state(modeling) == before


@HAS_REGISTRY
def test_kernels_of_other_peoples(modeling: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function registered under a known name is not taken for transformers' own; a partial of its flash attention is."""
    registry = table(OWN)
    flash = OWN["flash_attention_2"]
    for name in ("sdpa", "flash_attention_2", "flex_attention", "eager"):
        monkeypatch.setitem(registry, name, theirs)
        used = layer(modeling, name)
        with watched_kernels([used], used, run):
            assert OWN[name]() == (name, "interface", "theirs")
        assert OWN[name] is theirs
    partial = functools.partial(flash, softcap=2.0)
    monkeypatch.setitem(registry, "flash_attention_2", partial)
    used = layer(modeling, "flash_attention_2")
    with watched_kernels([used], used, run):
        assert OWN["flash_attention_2"] is partial


@HAS_REGISTRY
def test_flash_attention_that_cannot_be_watched_inside_is_watched_outside(
    modeling: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers' flash attention calls a function by another name, its registered function is watched, as an unknown one."""
    monkeypatch.delattr(sys.modules["transformers.integrations.flash_attention"], FLASH)
    used = layer(modeling, "flash_attention_2")
    with watched_kernels([used], used, run):
        assert OWN["flash_attention_2"].kernel.convention == "interface"


@pytest.mark.skipif(not hasattr(transformers, "DogeConfig"), reason="this transformers has no Doge")
def test_a_modeling_module_with_a_registry_of_its_own() -> None:
    """Doge declares a registry in its modeling module: the kernel is watched there, and the shared registry stays."""
    from transformers.models.doge import modeling_doge

    own, shared = modeling_doge.ALL_ATTENTION_FUNCTIONS, dict(table(OWN))
    before = dict(own._local_mapping)
    used = modeling_doge.DogeAttention.__new__(modeling_doge.DogeAttention)
    nn.Module.__init__(used)
    used.config = types.SimpleNamespace(_attn_implementation="doge_flex_attention")
    with watched_kernels([used], used, run):
        assert own["doge_flex_attention"].kernel.convention == "interface"
        assert table(OWN) == shared
    assert own._local_mapping == before


def test_a_watched_kernel_looks_like_the_kernel() -> None:
    """Name, documentation and signature are the kernel's own, for code that inspects it."""

    def kernel(module: Any, query: Any, scaling: float = 1.0) -> Any:
        """Attend."""

    watched = WatchedKernel(Kernel("kernel", "interface", kernel), run, {}, "kernel")
    assert (watched.__name__, watched.__doc__) == ("kernel", "Attend.")
    assert inspect.signature(watched) == inspect.signature(kernel)
    assert copy.copy(watched).kernel == watched.kernel


def test_a_model_in_another_thread_passes_through() -> None:
    """While a window is open here, the same kernel called in another thread, or outside any tap, runs as if nothing stood round it."""
    reported: list[Any] = []
    calls: list[Callable[[], Any]] = []

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.ones(1)

    watched = WatchedKernel(Kernel("kernel", "interface", kernel), run_kernel, {}, "kernel")
    with AttentionTap(reported.append, reported.append):
        thread = threading.Thread(target=lambda: calls.append(watched()))
        thread.start()
        thread.join()
    calls.append(watched())
    assert reported == []
    assert len(calls) == 2
