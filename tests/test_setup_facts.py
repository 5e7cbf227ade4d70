"""The facts of a run before its first step: tokenizer, embedding, head, steps; for every model, and through LoRA."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, WhisperFeatureExtractor

import models
import probe
from models.case import Case
from models.running import run
from probe.records import Setup
from probe.sites.audio_inputs import log_mel_scale, mel_bins_in, mel_bins_of
from probe.sites.discovery import discover
from probe.sites.dropout import config_dropout
from probe.sites.tokenizers import TokenizerFacts, read_tokenizer, runs_of
from probe.trainer.setup import read_setup
from watching import observed_run

SEED = 6
CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]


class Reader(TrainerCallback):
    """Reads the setup when training begins, as the session does."""

    def __init__(self, processors: list[Any]) -> None:
        self.processors, self.trainer, self.setup = processors, None, None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.setup = read_setup(self.trainer, model, discover(model), self.processors)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def setup_of(case: Case, *processors: Any, **arguments: Any) -> Setup:
    """Return the setup of a training of one step, or more."""
    reader = Reader(list(processors))

    def built(trainer: Trainer) -> None:
        reader.trainer = trainer
        trainer.add_callback(reader)

    run(case, seed=SEED, built=built, **{"max_steps": 1, **arguments})
    assert reader.setup is not None
    return reader.setup


@pytest.mark.parametrize("case", CASES)
def test_every_model(case: Case) -> None:
    """Class, vocabulary, tokenizer, mel bins, codebooks and dropout are those that the model was built with; ties are as built."""
    tokenizer = case.tokenizer()
    setup = setup_of(case, None, tokenizer)
    model = case.build(SEED)
    assert setup.vocabulary == case.vocabulary
    assert setup.tokenizer_size == max(tokenizer.get_vocab().values()) + 1 == len(tokenizer)
    assert (setup.added_tokens, setup.embedding_trains, setup.adapters) == (0, True, 0)
    assert setup.encoder_decoder == (case.name == "whisper")
    assert setup.mel_bins == (None if case.encoder is None else 16)
    assert setup.codebooks == {"higgs_audio_v2": 4, "original": 3}.get(case.name, 0)
    assert setup.model_class == type(model.model if case.name == "original" else model).__name__
    heads = [model.get_submodule(name) for name in case.heads]
    shared = any(head.weight is parameter for head in heads for name, parameter in model.named_parameters() if "embed_tokens" in name)
    if setup.ties_head is not None:
        assert (setup.ties_head, setup.head_is_tied) == (shared, shared)
    assert (setup.ties_head is None) == (case.name in ("higgs_audio_v2", "original"))
    assert (setup.max_steps, setup.warmup_steps, setup.accumulation, setup.max_grad_norm, setup.ranks) == (1, 0, 1, 1.0, 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_steps": 9, "warmup_steps": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}, (9, 4, 2, 0.0)),
        ({"max_steps": -1, "num_train_epochs": 2, "warmup_steps": 30, "max_grad_norm": 5.0}, (8, 30, 1, 5.0)),
        ({"max_steps": 4, "lr_scheduler_type": "cosine", "warmup_steps": 1}, (4, 1, 1, 1.0)),
        ({"max_steps": 4, "lr_scheduler_type": "constant"}, (4, None, 1, 1.0)),
    ],
)
def test_the_training_arguments(arguments: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """Steps, warm-up, accumulation and clipping are those that the Trainer will use; without a warm-up in the schedule nothing is said."""
    setup = setup_of(models.CASES["llama"], **arguments)
    assert (setup.max_steps, setup.warmup_steps, setup.accumulation, setup.max_grad_norm) == expected


def test_a_share_of_the_steps_as_warm_up() -> None:
    """A share of the steps is counted in steps."""
    share = {"warmup_steps": 0.25} if int(transformers.__version__.split(".")[0]) >= 5 else {"warmup_ratio": 0.25}
    assert setup_of(models.CASES["llama"], max_steps=8, **share).warmup_steps == 2


def test_a_schedule_of_the_users_own() -> None:
    """A scheduler that says nothing of warm-up leaves it unknown; one of transformers tells its own number, not the arguments'."""

    class Own(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
            return self.lr_scheduler

    class Other(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = transformers.get_linear_schedule_with_warmup(self.optimizer, 7, 20)
            return self.lr_scheduler

    for trainer, steps in ((Own, None), (Other, 7)):
        assert setup_of(replace(models.CASES["llama"], trainer_class=trainer), warmup_steps=3).warmup_steps == steps


def test_a_head_that_was_untied() -> None:
    """A copied head is seen as untied although config and class say that it is tied; an embedding that is only equal is no tie."""

    def untied(seed: int) -> nn.Module:
        model = models.CASES["whisper"].build(seed)
        model.proj_out.weight = nn.Parameter(model.proj_out.weight.detach().clone())
        return model

    setup = setup_of(replace(models.CASES["whisper"], build=untied))
    assert (setup.ties_head, setup.head_is_tied) == (True, False)


def test_a_default_of_the_config_ties_nothing() -> None:
    """``tie_word_embeddings`` alone, true by default in many configs, does not mean a tie where the class names no tied weight."""
    model = models.CASES["llama"].build(SEED)
    model.config.tie_word_embeddings = True
    type(model)._tied_weights_keys, kept = [], type(model)._tied_weights_keys
    try:
        setup = setup_of(replace(models.CASES["llama"], build=lambda seed: model))
    finally:
        type(model)._tied_weights_keys = kept
    assert (setup.ties_head, setup.head_is_tied) == (False, False)


def test_an_embedding_that_trains_and_one_that_does_not() -> None:
    """Frozen is frozen; LoRA leaves it frozen unless it adapts or saves the embedding itself."""
    peft = pytest.importorskip("peft")
    case = models.CASES["llama"]

    def frozen(seed: int) -> nn.Module:
        model = case.build(seed)
        model.get_input_embeddings().requires_grad_(False)
        return model

    def adapted(**config: Any) -> Any:
        return lambda seed: peft.get_peft_model(case.build(seed), peft.LoraConfig(r=2, **config))

    assert setup_of(replace(case, build=frozen)).embedding_trains is False
    builds = {
        ("q_proj",): (adapted(target_modules=["q_proj"]), False, 2),
        ("q_proj", "embed_tokens"): (adapted(target_modules=["q_proj", "embed_tokens"]), True, 3),
        ("saved",): (adapted(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), True, 2),
    }
    for build, trains, adapters in builds.values():
        setup = setup_of(replace(case, build=build))
        assert (setup.embedding_trains, setup.adapters, setup.model_class, setup.vocabulary) == (trains, adapters, "LlamaForCausalLM", 288)


def test_tokens_added_to_a_tokenizer_made_in_memory() -> None:
    """Its special tokens belong to how it was made, plain tokens were added; the tokenizer itself is the same afterwards."""
    tokenizer = copy.deepcopy(models.CASES["llama"].tokenizer())
    assert read_tokenizer([tokenizer]) == TokenizerFacts(259, ())
    tokenizer.add_tokens(["<new>", "<newer>"])
    assert read_tokenizer([None, object(), tokenizer]) == TokenizerFacts(261, (259, 260))
    assert len(tokenizer) == 261


def test_tokens_added_to_a_tokenizer_that_was_loaded(tmp_path: Path) -> None:
    """What came with its files is no addition, special or not; what was added since is, special or not."""
    tokenizer = copy.deepcopy(models.CASES["whisper"].tokenizer())
    tokenizer.add_tokens(["<plain>"])
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert read_tokenizer([loaded]) == TokenizerFacts(262, ())
    loaded.add_tokens(["<new>"])
    loaded.add_special_tokens({"additional_special_tokens": ["<special>"]})
    assert read_tokenizer([loaded]) == TokenizerFacts(264, (262, 263))


def test_a_tokenizer_whose_files_are_gone_leaves_it_unknown() -> None:
    """Where nothing tells what a tokenizer was loaded with, no token is called added."""
    tokenizer = copy.deepcopy(models.CASES["llama"].tokenizer())
    tokenizer.name_or_path = "nobody/has-this"
    tokenizer.add_tokens(["<new>"])
    assert read_tokenizer([tokenizer]) == TokenizerFacts(260, None)


def test_processors_of_all_sorts() -> None:
    """A tokenizer inside a processor is read; what has no vocabulary, or raises when asked for it, is passed over."""

    class Raises:
        def get_vocab(self) -> dict[str, int]:
            raise NotImplementedError

    class Processor:
        tokenizer = models.CASES["llama"].tokenizer()

    assert read_tokenizer([Raises(), Processor()]) == TokenizerFacts(259, ())
    assert read_tokenizer([Raises(), None, WhisperFeatureExtractor()]) is None


def test_ranges_of_ids() -> None:
    """Ids become ranges from the first to the one past the last."""
    assert runs_of([3, 4, 5, 9, 11, 12]) == [(3, 6), (9, 10), (11, 13)]
    assert runs_of([]) == []


def test_mel_bins_of_features_and_encoder() -> None:
    """Of an encoder with Whisper's front end they are known; of others only where the config's number is one of the sizes."""
    whisper = models.CASES["whisper"].build(SEED).model.encoder
    assert mel_bins_of(whisper) == 16
    assert mel_bins_in(torch.zeros(2, 80, 100), whisper) == 80
    other = nn.Module()
    assert mel_bins_of(other) is None
    assert mel_bins_in(torch.zeros(2, 80, 100), other) is None
    other.config = {"num_mel_bins": 80}
    assert mel_bins_in(torch.zeros(2, 100, 80), other) == 80
    assert mel_bins_in(torch.zeros(2, 100, 64), other) is None


def test_the_scale_that_is_expected() -> None:
    """Whisper's own extractor tells the scale; without one the encoder's front end does; another extractor leaves it unknown."""

    class Other:
        sampling_rate, feature_size = 16_000, 80

    class Processor:
        feature_extractor = WhisperFeatureExtractor(feature_size=128)

    encoder = models.CASES["whisper"].build(SEED).model.encoder
    highest = {
        "extractor": log_mel_scale(encoder, [None, WhisperFeatureExtractor()]),
        "in a processor": log_mel_scale(None, [Processor()]),
        "front end": log_mel_scale(encoder, [models.CASES["whisper"].tokenizer()]),
        "other": log_mel_scale(encoder, [Other()]),
        "other rate": log_mel_scale(encoder, [WhisperFeatureExtractor(sampling_rate=8000)]),
        "too many bins": log_mel_scale(None, [WhisperFeatureExtractor(feature_size=160)]),
        "no encoder": log_mel_scale(None, []),
    }
    assert {name: scale and scale.highest for name, scale in highest.items()} == {
        "extractor": 2.2,
        "in a processor": 2.2,
        "front end": 2.2,
        "other": None,
        "other rate": None,
        "too many bins": None,
        "no encoder": None,
    }


def test_dropout_that_configs_name() -> None:
    """The largest rate of any config counts; rates of heads for other tasks do not, nor do flags."""
    model = nn.Module()
    assert config_dropout(model) is None
    model.config = {"classifier_dropout": 0.9, "attention_dropout": 0.2, "resid_pdrop": 0.3, "use_dropout": True, "dropout": 0}
    assert config_dropout(model) == 0.3


def test_run_json_holds_the_setup() -> None:
    """The run folder tells the setup, and the findings' rules are given it."""
    case = models.CASES["whisper"]
    result, _ = observed_run(case, options={"tokenizer": case.tokenizer()}, seed=SEED, max_steps=2, warmup_steps=5)
    folder = Path(result.trainer.args.output_dir) / "_probe"
    told = probe.load(folder).facts["setup"]
    assert told["warmup_steps"] == 5
    assert told["tokenizer_size"] == len(case.tokenizer())
    assert json.loads(json.dumps(told)) == told
    assert Setup(**told) == setup_of(case, case.tokenizer(), max_steps=2, warmup_steps=5)


def test_an_error_in_it_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the setup cannot be read, training is observed all the same, and the folder says null."""

    def fails(*args: Any) -> Setup:
        raise RuntimeError("no setup")

    monkeypatch.setattr("probe.trainer.session.read_setup", fails)
    result = run(
        models.CASES["llama"],
        seed=SEED,
        max_steps=2,
        attach=lambda model: probe.attach(model, every=1, settings=probe.Settings(terminal=False)),
    )
    result.attached.detach()
    assert result.attached.last is not None
    assert result.attached.last.step == 2
    assert probe.load(Path(result.trainer.args.output_dir) / "_probe").facts["setup"] is None
