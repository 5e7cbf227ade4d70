"""Compiled regions that stay compiled: one operator a site reports, in sampled steps, and nothing else is different."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import costs
import probe.capture.in_graph as in_graph
from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.compiled_sites import UNSEEN
from probe.capture.hooks import HookSet
from probe.capture.observer import Call, Watcher
from probe.capture.observers.statistics import StatisticsWatcher
from probe.capture.window import Window
from probe.foreign.compiled import compiled_regions
from probe.records import Site

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

LAYERS, WIDTH, STEPS = 3, 8, 4
KINDS = ("wrapper", "call", "forward", "layers")


class Layer(nn.Module):
    """A layer with dropout that may be recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.dropout = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.dropout(torch.relu(self.mix(self.norm(x)))), None


class Head(nn.Linear):
    """A head that may break the graph."""

    broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            torch._dynamo.graph_break()
        return super().forward(x) * 2


class Model(nn.Module):
    """Layers and a head; ``reentrant`` checkpoints the layers, ``broken`` breaks the graph in the head."""

    def __init__(self, *, reentrant: bool | None = None, broken: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = Head(WIDTH, 5)
        self.head.broken, self.reentrant = broken, reentrant

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x, _ = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        logits = self.head(x)
        return {"loss": logits.square().mean(), "logits": logits}


class Wants(Watcher):
    """An observer of a given name that notes what it is shown."""

    def __init__(self, name: str, names: tuple[str, ...]) -> None:
        self.name, self._names, self.seen = name, names, []

    def sites(self) -> tuple[str, ...]:
        return self._names

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        self.seen.append(("enter", call.site.name))

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        self.seen.append(("leave", call.site.name))


class Rig:
    """A model, compiled as asked, with its window and observers; ``observed=False`` leaves the probe out."""

    def __init__(
        self,
        kind: str = "wrapper",
        *,
        backend: str = "eager",
        observed: bool = True,
        compile_options: dict[str, Any] | None = None,
        observers: tuple[Watcher, ...] = (),
        before: Callable[[nn.Module], None] = lambda called: None,
        **options: Any,
    ) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(3)
        self.model = Model(**options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.called: nn.Module = self.model
        how = {"backend": backend} if compile_options is None else compile_options
        if kind == "wrapper":
            self.called = torch.compile(self.model, **how)
        elif kind == "call":
            self.model.compile(**how)
        elif kind == "forward":
            self.model.forward = torch.compile(self.model.forward, **how)
        elif kind == "layers":
            for layer in self.model.layers:
                layer.compile(**how)
        before(self.called)
        torch.manual_seed(4)
        self.said: list[str] = []
        self.breaker = Breaker(self.said.append)
        self.names = [*(f"layers.{i}" for i in range(LAYERS)), "head"]
        sites = {"": Site("", "model", ""), **{name: Site(name, "custom", "") for name in self.names}}
        sites["head"] = Site("head", "lm_head", "")
        modules = {name: self.model.get_submodule(name) for name in sites}
        self.root = Wants("inputs", ("",))
        self.statistics = StatisticsWatcher(list(sites.values()), keep=())
        hooks = HookSet(modules, sites, [self.root, self.statistics, *observers], self.breaker)
        self.window = Window(hooks, self.breaker, around=self.called, compile_mode="in_graph")
        self.buffer = StepBuffer(budget_bytes=1 << 20, sites=tuple(self.names), cells=self.statistics.cells())
        self.losses: list[float] = []
        self.observed = observed
        if observed:
            self.window.begin()

    def step(self, number: int, *, sampled: bool) -> None:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(2, 6, WIDTH, generator=generator).requires_grad_()  # a reentrant checkpoint wants that
        if sampled and self.observed:
            self.buffer.open(number)
            with self.window.armed(self.buffer, batch={}):
                self._learn(x)
        else:
            self._learn(x)

    def _learn(self, x: Tensor) -> None:
        loss = self.called(x)["loss"]
        loss.backward()
        self.losses.append(loss.item())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self) -> Rig:
        for number in range(1, STEPS + 1):
            self.step(number, sampled=number % 2 == 0)
        return self

    def calls(self) -> dict[str, int]:
        return {name: len(self.buffer[name]) for name in self.names}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert not in_graph._OPEN
    torch._dynamo.reset()


def counted() -> tuple[int, int]:
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def same(plain: Rig, observed: Rig) -> bool:
    pairs = zip(plain.model.state_dict().values(), observed.model.state_dict().values())
    return plain.losses == observed.losses and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_and_nothing_is_compiled_more(kind: str, backend: str) -> None:
    """Losses and weights are bit-identical, dropout included; as many graphs, breaks and recompiles; each site counts one call."""
    plain = Rig(kind, backend=backend, observed=False).train()
    expected = counted()
    observed = Rig(kind, backend=backend).train()
    assert counted() == expected
    assert expected[0] == 1
    assert same(plain, observed)
    assert observed.calls() == {"layers.0": 1, "layers.1": 1, "layers.2": 1, "head": 1}
    assert observed.root.seen == [("enter", ""), ("leave", "")] * 2
    assert observed.said == []


def test_inductor() -> None:
    """Under inductor the same: bit-identical, no graph more, each call counted."""
    plain = Rig("layers", backend="inductor", observed=False).train()
    expected = counted()
    observed = Rig("layers", backend="inductor").train()
    assert counted() == expected
    assert same(plain, observed)
    assert observed.calls() == {"layers.0": 1, "layers.1": 1, "layers.2": 1, "head": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_tensors(kind: str) -> None:
    """What is reported are the moments of the very tensors, compared with those of an eager run, in float64."""
    outputs: dict[str, Tensor] = {}
    eager = Rig("none", observed=False)
    for name in eager.names:
        eager.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output[0] if isinstance(output, tuple) else output})
        )
    eager.step(1, sampled=False)
    rig = Rig(kind)
    rig.step(1, sampled=True)
    for name in rig.names:
        (capture,) = rig.buffer[name]
        found, wanted = capture.statistics(), outputs[name].detach().double()
        assert capture.shape == tuple(wanted.shape)
        assert found.mean == pytest.approx(wanted.mean().item(), abs=1e-6)
        assert found.rms == pytest.approx(wanted.square().mean().sqrt().item(), rel=1e-6)
        assert found.maximum == pytest.approx(wanted.max().item(), rel=1e-6)


def test_layers_that_share_code_share_it_still() -> None:
    """One graph serves all layers, as without the probe, and each call is reported under its own name."""
    rig = Rig("layers")
    with torch.no_grad():
        for i, layer in enumerate(rig.model.layers):
            layer.norm.bias.fill_(i)  # so that their outputs differ
    rig.train()
    assert counted()[0] == 1
    assert len({rig.buffer[name][0].statistics().mean for name in rig.names[:LAYERS]}) == LAYERS


def test_outside_sampled_steps_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator is called in every step and returns at once in those that are not sampled: no tensor operation but itself."""
    rig = Rig("wrapper")
    bodies, reports = [], []
    monkeypatch.setattr(in_graph, "_report", lambda *args: reports.append(1))
    site, output = rig.model.head.__dict__[in_graph.SITE], torch.randn(2, 3)
    rig.step(1, sampled=False)
    assert reports == []
    assert costs.operations(lambda: bodies.append(torch.ops.probe.observe(output, site))) == 1
    rig.step(2, sampled=True)
    assert len(reports) == LAYERS + 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["wrapper", "layers"])
def test_recompute_is_not_counted(kind: str, reentrant: bool) -> None:
    """Under both kinds of checkpointing the layers run again in the backward, and count once."""
    with torch._dynamo.config.patch(error_on_recompile=False):  # a reentrant checkpoint runs with and without gradients
        plain = Rig(kind, observed=False, reentrant=reentrant).train()
        expected = counted()
        rig = Rig(kind, reentrant=reentrant).train()
    assert counted() == expected
    assert same(plain, rig)
    assert rig.calls() == {"layers.0": 1, "layers.1": 1, "layers.2": 1, "head": 1}


def test_only_training_forwards_count() -> None:
    """Inside the window, neither a forward without gradients nor a layer called by itself is counted."""
    rig = Rig("layers")
    rig.buffer.open(1)
    with rig.window.armed(rig.buffer, batch={}):
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
            rig.called(torch.randn(2, 6, WIDTH))
        with torch._dynamo.config.patch(error_on_recompile=False):
            rig.model.layers[0](torch.randn(2, 6, WIDTH))  # outside any forward of the root
    assert sum(rig.calls().values()) == 0


def test_a_layer_called_beside_the_root_is_not_reported() -> None:
    """Inside the window, but outside any forward of the root, a call does not count as the report of its site."""
    rig = Rig("layers")
    first, rig.model.layers = rig.model.layers[0], rig.model.layers[1:]
    rig.buffer.open(1)
    with rig.window.armed(rig.buffer, batch={}):
        first(rig.called(torch.randn(2, 6, WIDTH).requires_grad_())["logits"] @ torch.ones(5, WIDTH))
    assert rig.calls() == {"layers.0": 0, "layers.1": 1, "layers.2": 1, "head": 1}
    assert "did not report" in rig.buffer.totals.reasons["site:layers.0"]
    assert "site:layers.1" not in rig.buffer.totals.reasons


def test_recompute_inside_the_forward_is_not_counted() -> None:
    """A model that takes a gradient inside its forward recomputes checkpointed layers there, while the root's forward is open."""

    def penalised(x: Tensor) -> dict[str, Tensor]:
        y, _ = checkpoint(rig.model.layers[0], x, use_reentrant=True)
        y.sum().backward()
        return {"loss": rig.model.head(x * x.grad).sum()}

    rig = Rig("layers")
    rig.model.forward = penalised
    rig.buffer.open(1)
    with rig.window.armed(rig.buffer, batch={}), torch._dynamo.config.patch(error_on_recompile=False):
        rig.called(torch.randn(2, 6, WIDTH).requires_grad_())
    assert rig.calls() == {"layers.0": 1, "layers.1": 0, "layers.2": 0, "head": 1}


def test_a_broken_graph_gets_no_graph_more() -> None:
    """Where the model breaks its graph, hooks run between the graphs; they are not compiled for their own sake."""
    plain = Rig("wrapper", observed=False, broken=True).train()
    expected = counted()
    rig = Rig("wrapper", broken=True).train()
    assert counted() == expected
    assert expected[0] > 1
    assert same(plain, rig)
    assert rig.calls() == {"layers.0": 1, "layers.1": 1, "layers.2": 1, "head": 1}


def test_a_model_that_was_called_before_is_named() -> None:
    """Code that was made before the hooks stood has no operator: said once, with the names, what happened and what to do."""
    rig = Rig("wrapper", before=lambda called: called(torch.randn(2, 6, WIDTH).requires_grad_()))
    rig.train()
    assert sum(rig.calls().values()) == 0
    assert len(rig.said) == 1
    assert "layers.0, layers.1, layers.2, head" in rig.said[0]
    assert "torch.compiler.reset()" in rig.said[0]
    for name in rig.names:
        assert "torch.compiler.reset()" in rig.buffer.totals.reasons[f"site:{name}"]


def test_an_evaluation_before_training_is_no_harm() -> None:
    """Code made for another mode is not that of training: what is made for training has the operator."""

    def evaluate(called: nn.Module) -> None:
        with torch.no_grad():
            called.eval()(torch.randn(2, 6, WIDTH))
        called.train()

    with torch._dynamo.config.patch(error_on_recompile=False):
        rig = Rig("wrapper", before=evaluate).train()
    assert rig.calls() == {"layers.0": 1, "layers.1": 1, "layers.2": 1, "head": 1}
    assert rig.said == []


def test_afterwards_the_model_is_as_before() -> None:
    """No hook and no attribute stays; the code is made anew at the next call, once."""
    rig = Rig("wrapper")
    before = [set(module.__dict__) for module in Rig("wrapper", observed=False).model.modules()]
    rig = Rig("wrapper").train()
    rig.window.end()
    assert [set(module.__dict__) for module in rig.model.modules()] == before
    assert not any(module._forward_hooks for module in rig.called.modules())
    graphs = counted()[0]
    with torch._dynamo.config.patch(error_on_recompile=False):
        rig.step(9, sampled=False)
        rig.step(10, sampled=False)
    assert counted()[0] == graphs + 1


def test_a_second_training_uses_the_code_of_the_first() -> None:
    """Hooks that go and come again between two trainings cost no compile if the model is not called in between."""
    rig = Rig("layers").train()
    rig.window.end()
    rig.window.begin()
    rig.step(6, sampled=True)
    assert counted()[0] == 1
    assert rig.calls() == {"layers.0": 1, "layers.1": 1, "layers.2": 1, "head": 1}


def test_two_models_are_told_apart() -> None:
    """What one model's code reports never reaches the window of another."""
    rig = Rig("wrapper")
    other = in_graph.InGraph([one for one in rig.window._hooks.watched() if one.site.name == "head"], rig.window._hooks, rig.breaker)
    strange = torch.tensor([id(other), 0])
    rig.buffer.open(1)
    with rig.window.armed(rig.buffer, batch={}):
        rig.called(torch.randn(2, 6, WIDTH).requires_grad_())
        torch.ops.probe.observe(torch.randn(2, 3), strange)
    assert rig.calls()["head"] == 1


def test_copies_and_pickles_need_no_probe() -> None:
    """A deep copy works and reports nothing; a pickle of the model loads where this package is not; state_dict is the same."""
    torch._dynamo.reset()
    plain, observed = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    (observed[0]).compile(backend="eager")
    site = Site("0", "custom", "")
    watcher = StatisticsWatcher([site], keep=())
    breaker = Breaker(print)
    hooks = HookSet({"": observed, "0": observed[0]}, {"": Site("", "model", ""), "0": site}, [watcher], breaker)
    window = Window(hooks, breaker, around=observed, compile_mode="in_graph")
    window.begin()
    assert len(observed[0]._forward_hooks) == 1
    assert list(observed.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(observed)
    buffer = StepBuffer(budget_bytes=1 << 20, sites=("0",), cells=watcher.cells())
    buffer.open(1)
    with window.armed(buffer, batch={}):
        copied(torch.randn(3, 2))
    assert len(buffer["0"]) == 0
    code = "import pickle, sys, torch; sys.modules['probe'] = None; print(pickle.load(sys.stdin.buffer)(torch.zeros(1, 2)).shape)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(observed), capture_output=True, timeout=120, check=False)
    assert done.stdout.strip() == b"torch.Size([1, 2])", done.stderr.decode()
    window.end()


def test_an_export_holds_no_operator() -> None:
    """A model that is exported or traced while it trains becomes what it would without the probe."""
    rig = Rig("wrapper")
    assert in_graph.SITE in rig.model.head.__dict__
    module = nn.Sequential(rig.model.head)
    traced = torch.jit.trace(module, torch.randn(1, WIDTH))
    assert "observe" not in str(traced.inlined_graph)
    for strict in (False, True):
        exported = torch.export.export(module, (torch.randn(1, WIDTH),), strict=strict)
        assert "observe" not in str(exported.graph)


def test_cuda_graphs_are_refused() -> None:
    """A region compiled for CUDA graphs gets no operator; what is inside is named with that reason, and the root is seen."""
    rig = Rig("wrapper", compile_options={"mode": "reduce-overhead", "backend": "inductor"})
    assert not any(module._forward_hooks for module in rig.model.modules())
    assert [region.replays for region in compiled_regions(rig.called)] == [True]
    rig.called.forward = rig.model.forward  # it need not be compiled to be told
    rig.step(1, sampled=True)
    reasons = rig.buffer.totals.reasons
    for what in ("site:layers.0", "site:head", "head:head", f"{UNSEEN}statistics"):
        assert "CUDA graphs" in reasons[what]
    assert rig.root.seen == [("enter", ""), ("leave", "")]
    assert rig.said == []


def test_what_outputs_do_not_tell_is_named() -> None:
    """Observers that need more are left out: named by site, and as a whole where they see no site at all."""
    everywhere = ("", "layers.0", "layers.1", "layers.2", "head")
    some = ("layers.0", "head")
    attention, heads, branches = Wants("attention", some), Wants("heads", everywhere), Wants("branches", some)
    rig = Rig("layers", observers=(attention, heads, branches))
    rig.step(1, sampled=True)
    reasons = rig.buffer.totals.reasons
    assert "compile='in_graph'" in reasons["attention:layers.0"]
    assert "attention:head" not in reasons  # the head is in no region
    assert f"{UNSEEN}attention" not in reasons
    assert "compile='in_graph'" in reasons[f"{UNSEEN}branches"]  # a sum over some of the layers would look like all
    assert attention.seen == [("enter", "head"), ("leave", "head")]
    assert heads.seen == [("enter", ""), ("enter", "head"), ("leave", "head"), ("leave", "")]  # layers feed it: it would hold them
    whole = Rig("wrapper", observers=(Wants("attention", ("layers.0", "head")),))
    whole.step(1, sampled=True)
    assert "compile='in_graph'" in whole.buffer.totals.reasons[f"{UNSEEN}attention"]


def test_a_head_inside_is_shown_and_an_error_in_an_observer_costs_that_observer_only() -> None:
    """The observer of heads sees the head's output in a compiled model; when it fails, training and the others go on."""

    class Failing(Wants):
        def leave(self, call: Call, buffer: StepBuffer) -> None:
            assert call.output.shape == (2, 6, 5)
            raise ValueError("broken")

    plain = Rig("wrapper", observed=False).train()
    rig = Rig("wrapper", observers=(Failing("heads", ("head",)),)).train()
    assert same(plain, rig)
    assert list(rig.breaker.failures) == ["heads"]
    assert "broken" in rig.said[0]
    assert rig.calls()["head"] == 1


def test_an_attention_layer_that_holds_a_region_is_left_alone() -> None:
    """A function mode round compiled code would have it compiled again: no hook goes there, and the reason is named."""
    rig = Rig("none")
    rig.model.layers[0].mix.compile(backend="eager")
    sites = {"": Site("", "model", ""), "layers.0": Site("layers.0", "attention", "", kind="decoder")}
    hooks = HookSet({"": rig.model, "layers.0": rig.model.layers[0]}, sites, [Wants("attention", ("layers.0",))], rig.breaker)
    window = Window(hooks, rig.breaker, around=rig.model, compile_mode="in_graph", layers=[rig.model.layers[0]])
    rig.buffer.open(1)
    with window.armed(rig.buffer, batch={}):
        assert not rig.model.layers[0]._forward_hooks
    assert "taken a part" in rig.buffer.totals.reasons["attention:layers.0"]
