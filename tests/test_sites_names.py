"""Names: wrappers and PEFT are looked through, and the module that really runs stands under the plain name."""

from __future__ import annotations

from collections.abc import Iterator

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import models
from probe.sites.names import canonical_name, class_name, module_names, unwrapped


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one, so that the real DDP and FSDP wrappers can be made."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("", ""),
        ("model.layers.0", "model.layers.0"),
        ("module.model.layers.0.weight", "model.layers.0.weight"),
        ("module.module.lm_head", "lm_head"),
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp", "model.layers.0.mlp"),
        ("_orig_mod.model.layers.1._orig_mod.self_attn", "model.layers.1.self_attn"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("module.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("llm.base_model.model.model.norm", "llm.model.norm"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("base_model.encoder", "base_model.encoder"),
    ],
)
def test_canonical_name_strips_what_wrappers_add(raw: str, plain: str) -> None:
    """Prefixes of FSDP, checkpointing, compile, DDP and PEFT go; a user's own ``module`` or ``base_model`` further down stays."""
    assert canonical_name(raw) == plain


def test_names_of_an_unwrapped_model_are_pytorchs_own() -> None:
    """Without wrappers every module has the name that ``named_modules`` gives, in the same order."""
    model = models.CASES["llama"].build(0)
    assert list(module_names(model).by_name.items()) == list(model.named_modules())


def test_user_attributes_that_look_like_wrappers_keep_their_names() -> None:
    """``base_model.model`` outside PEFT and ``module`` beside other children are plain attributes."""
    inner = nn.Module()
    inner.model = nn.Linear(2, 2)
    outer = nn.Module()
    outer.base_model, outer.module = inner, nn.Linear(2, 2)
    assert {"base_model", "base_model.model", "module"} <= module_names(outer).by_name.keys()


def test_wrapped_layers_keep_their_names_and_the_inner_module_takes_them(one_process: None) -> None:
    """DDP round the model, compile and activation checkpointing round its layers: names as before, modules the inner ones."""
    case = models.CASES["llama"]
    plain, wrapped = case.build(0), case.build(0)
    inner = [wrapped.model.layers[0], wrapped.model.layers[1]]
    wrapped.model.layers[0] = checkpoint_wrapper(wrapped.model.layers[0])
    wrapped.model.layers[1] = torch.compile(wrapped.model.layers[1], backend="eager")
    ddp = nn.parallel.DistributedDataParallel(wrapped)
    names = module_names(ddp)
    assert list(names.by_name) == [name for name, _ in plain.named_modules()]
    assert [names.by_name[f"model.layers.{index}"] for index in (0, 1)] == inner
    assert names.by_name[""] is ddp
    assert names.find(wrapped.model.layers[0]) == "model.layers.0"


def test_fsdp1_keeps_names(one_process: None) -> None:
    """FSDP round the model and round a layer: the names are those of the plain model."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    case = models.CASES["llama"]
    plain, wrapped = case.build(0), case.build(0)
    layer = wrapped.model.layers[0]
    cpu = torch.device("cpu")
    wrapped.model.layers[0] = FullyShardedDataParallel(layer, device_id=cpu, use_orig_params=True)
    fsdp = FullyShardedDataParallel(wrapped, device_id=cpu, use_orig_params=True)
    names = module_names(fsdp)
    assert list(names.by_name) == [name for name, _ in plain.named_modules()]
    assert names.by_name["model.layers.0"] is layer


def test_class_names_lose_the_fsdp_prefix() -> None:
    """FSDP2 renames classes on the fly; a class that merely begins so keeps its name."""
    layer = nn.Linear(2, 2)
    layer.__class__ = type("FSDPLinear", (nn.Linear,), {})
    assert class_name(layer) == "Linear"
    assert class_name(type("FSDPlike", (nn.Module,), {})()) == "FSDPlike"


def _lora(model: nn.Module, **settings: object) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))


def test_saved_copy_takes_the_name_of_what_it_replaces() -> None:
    """With ``modules_to_save`` the copy that runs is ``lm_head``; wrapper and original are known under the same name."""
    model = models.CASES["llama"].build(0)
    original = model.lm_head
    wrapped = _lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    calls: list[nn.Module] = []
    for module in wrapped.modules():
        module.register_forward_hook(lambda module, args, output: calls.append(module))
    wrapped(input_ids=torch.tensor([[1, 2, 3]]))
    names = module_names(wrapped)
    running = names.by_name["lm_head"]
    assert running is not original
    assert running in calls
    assert original not in calls
    assert isinstance(running, nn.Linear)
    assert names.find(original) == names.find(model.lm_head) == "lm_head"
    assert unwrapped(model.lm_head) is running
    assert not any("modules_to_save" in name or "original_module" in name for name in names.by_name)


def test_below_a_saved_copy_the_names_are_the_copys() -> None:
    """What lies below the replaced original never runs, so no name leads there."""
    model = models.CASES["llama"].build(0)
    plain = [name for name, _ in model.named_modules() if "mlp" in name]
    wrapped = _lora(model, target_modules=["q_proj"], modules_to_save=["mlp"])
    names = module_names(wrapped)
    assert [name for name in names.by_name if "mlp" in name] == plain
    saved = model.model.layers[0].mlp.modules_to_save["default"]
    assert names.by_name["model.layers.0.mlp.up_proj"] is saved.up_proj


def test_two_modules_never_share_a_name() -> None:
    """Where a wrapper has a child of the same name as the module inside it, both are named."""
    model = nn.Module()
    model.layer = nn.Module()
    model.layer._orig_mod = nn.Module()
    model.layer._orig_mod.linear = nn.Linear(2, 2)
    model.layer.linear = nn.Linear(3, 3)
    model.layer._orig_mod.base = nn.Linear(4, 4)
    names = module_names(model)
    assert {module for module in names.by_name.values() if isinstance(module, nn.Linear)} == {
        model.layer.linear,
        model.layer._orig_mod.linear,
        model.layer._orig_mod.base,
    }
    assert names.by_name["layer.linear"] is model.layer._orig_mod.linear
    assert names.find(model.layer.linear) not in (None, "layer.linear")


def test_original_takes_its_name_back_when_the_adapter_is_off() -> None:
    """While adapters are disabled the original head is what runs under the name."""
    model = models.CASES["llama"].build(0)
    original = model.lm_head
    wrapped = _lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with wrapped.disable_adapter():
        assert module_names(wrapped).by_name["lm_head"] is original
    assert module_names(wrapped).by_name["lm_head"] is not original


def test_inactive_copies_do_not_take_the_name() -> None:
    """Of two adapters' copies the active one has the plain name."""
    model = models.CASES["llama"].build(0)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    wrapped = _lora(model, **settings)
    wrapped.add_adapter("other", peft.LoraConfig(r=2, **settings))
    first = module_names(wrapped).by_name["lm_head"]
    wrapped.set_adapter("other")
    second = module_names(wrapped).by_name["lm_head"]
    assert (first, second) == (model.lm_head.modules_to_save["default"], model.lm_head.modules_to_save["other"])


def test_lora_layer_keeps_the_name_and_its_base_is_known_by_it() -> None:
    """The LoRA layer's output is what the model goes on with; the replaced projection leads to it."""
    model = models.CASES["llama"].build(0)
    projection = model.model.layers[0].self_attn.q_proj
    names = module_names(_lora(model, target_modules=["q_proj"]))
    name = "model.layers.0.self_attn.q_proj"
    assert names.by_name[name] is model.model.layers[0].self_attn.q_proj
    assert names.by_name[name] is not projection
    assert names.find(projection) == name


def test_peft_below_a_wrapper_is_seen_through_there_too() -> None:
    """A PeftModel as an attribute of a user's module: the names below go on from that attribute."""
    outer = nn.Module()
    outer.llm = _lora(models.CASES["llama"].build(0), target_modules=["q_proj"])
    outer.projector = nn.Linear(2, 2)
    assert {"llm.model.layers.0.self_attn", "llm.lm_head", "projector"} <= module_names(outer).by_name.keys()


def test_prompt_tuning_names_are_those_of_the_plain_model() -> None:
    """Prompt learning puts the model directly under ``base_model``; the names are still the plain ones."""
    model = models.CASES["llama"].build(0)
    plain = {name for name, _ in model.named_modules()}
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert plain <= module_names(wrapped).by_name.keys()


def test_shared_module_stands_once() -> None:
    """A module used in two places has its first name only."""
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.second = model.first
    assert list(module_names(model).by_name) == ["", "first"]
