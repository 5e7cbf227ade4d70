"""Facts: what a model says of itself, found through wrappers and in sub-configs, and left unknown where nothing says it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import transformers
from torch import nn

import models
from models.case import Case
from probe.sites.configs import all_configs
from probe.sites.facts import core_model, read_facts


class Wrapper(nn.Module):
    """A user's module round a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.extra = nn.Linear(4, 4)


class HandWritten(nn.Module):
    """A model without any base class; ``config`` is whatever is given."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        if config is not None:
            self.config = config
        self.embed_tokens = nn.Embedding(77, 8)
        self.head = nn.Linear(8, 77)


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_vocabulary_shift_and_placeholder(case: Case) -> None:
    """For every model: rows of the embedding, label shift, and the id of its audio placeholder."""
    facts = read_facts(case.build(0))
    assert (facts.vocabulary, facts.label_shift) == (case.vocabulary, case.shift)
    placeholder = case.tokenizer().convert_tokens_to_ids(case.audio_token) if case.audio_token else None
    assert (placeholder in facts.audio_placeholders) if placeholder is not None else facts.audio_placeholders == ()


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_facts_are_the_same_through_a_wrapper_and_peft(case: Case) -> None:
    """A user's wrapper and a PeftModel change nothing of the facts."""
    plain = read_facts(case.build(0))
    assert read_facts(Wrapper(case.build(0))) == plain
    model, lora = case.build(0), peft.LoraConfig(r=2, target_modules=["q_proj"])
    if case.name == "original":  # PEFT wants a model with a config: it goes round the one inside the wrapper
        model.model = peft.get_peft_model(model.model, lora)
    else:
        model = peft.get_peft_model(model, lora)
    assert read_facts(model) == plain


@pytest.mark.skipif(not models.CASES["higgs_audio_v2"].available(), reason="this transformers has no HiggsAudioV2")
def test_higgs_audio_v2_ids() -> None:
    """Audio token and delay token are placeholders; begin and end are not; ids of the codebooks are no token ids."""
    model = models.CASES["higgs_audio_v2"].build(0)
    config, facts = model.config, read_facts(model)
    assert set(facts.audio_placeholders) == {config.audio_token_id, config.audio_delay_token_id}
    assert dict(facts.audio_tokens) == {
        name: getattr(config, name) for name in ("audio_token_id", "audio_delay_token_id", "audio_bos_token_id")
    }
    assert facts.codebooks == config.num_codebooks


def test_original_model_facts() -> None:
    """Audio-in and audio-out ids and the codebooks come from the config of the model inside the wrapper."""
    model = models.CASES["original"].build(0)
    facts = read_facts(model)
    config = model.model.config
    assert set(facts.audio_placeholders) == {config.audio_in_token_idx, config.audio_out_token_idx}
    assert facts.codebooks == config.audio_num_codebooks
    assert facts.model_class == "OriginalModel"


def test_fsdp_prefix_is_no_part_of_the_class() -> None:
    """FSDP2 renames the class on the fly; the fact names the class that the user knows."""
    model = models.CASES["llama"].build(0)
    model.__class__ = type("FSDPLlamaForCausalLM", (type(model),), {})
    assert read_facts(model).model_class == "LlamaForCausalLM"


def test_no_config_no_facts() -> None:
    """Of a bare module nothing is known but its class."""
    facts = read_facts(nn.Linear(2, 3))
    assert (facts.model_class, facts.model_type, facts.vocabulary, facts.codebooks) == ("Linear", "", None, 0)
    assert (facts.audio_tokens, facts.audio_placeholders, facts.encoder_decoder, facts.label_shift) == ((), (), False, 1)


def test_a_hand_written_model_is_read_by_the_usual_names() -> None:
    """Without get_input_embeddings the vocabulary is that of ``embed_tokens``."""
    assert read_facts(HandWritten()).vocabulary == 77


@pytest.mark.parametrize(
    "config",
    [
        SimpleNamespace(audio_in_token_idx=7, audio_out_token_idx=-1, audio_eos_token_id=[8, 9], audio_num_codebooks=3),
        {"audio_in_token_idx": 7, "audio_out_token_idx": None, "audio_eos_token_id": [8, 9], "audio_num_codebooks": 3},
        type("Plain", (), {"audio_in_token_idx": 7, "audio_eos_token_id": [8, 9], "audio_num_codebooks": 3})(),
    ],
    ids=["namespace", "mapping", "class attributes"],
)
def test_configs_of_any_make_are_read(config: Any) -> None:
    """Objects, mappings and class attributes; unset and negative ids are left out; a list gives each of its ids."""
    facts = read_facts(HandWritten(config))
    assert facts.audio_tokens == (("audio_in_token_idx", 7), ("audio_eos_token_id", 8), ("audio_eos_token_id", 9))
    assert (facts.audio_placeholders, facts.codebooks) == ((7,), 3)


def test_ids_in_sub_configs_are_found_and_the_outer_one_wins() -> None:
    """An id that stands only in a sub-config is found; where both have the name, the outer config's counts."""
    inner = SimpleNamespace(audio_token_index=11, audio_start_token_id=12)
    facts = read_facts(HandWritten(SimpleNamespace(audio_token_index=5, thinker_config=inner)))
    assert facts.audio_tokens == (("audio_token_index", 5), ("audio_start_token_id", 12))
    assert facts.audio_placeholders == (5,)


def test_a_config_that_contains_itself_ends() -> None:
    """Configs that refer to each other in a circle are read once each."""
    config = SimpleNamespace(audio_token_id=3)
    config.text_config = SimpleNamespace(thinker_config=config)
    assert read_facts(HandWritten(config)).audio_placeholders == (3,)
    assert all_configs(HandWritten(config)) == (config, config.text_config)


def test_a_codecs_codebooks_are_not_the_models() -> None:
    """A number of codebooks in a part that is not a language model does not make the model one of codes."""
    assert read_facts(HandWritten(SimpleNamespace(codec_config=SimpleNamespace(num_codebooks=8)))).codebooks == 0


class Speaking(nn.Module):
    """An encoder of transformers beside a language model of transformers, joined by hand."""

    def __init__(self, encoder: nn.Module, language: nn.Module) -> None:
        super().__init__()
        self.encoder, self.llm = encoder, language


def test_core_of_encoder_and_language_model_is_the_language_model() -> None:
    """Where a hand-written module joins a pretrained encoder and a pretrained language model, the latter is the core."""
    language = models.CASES["llama"].build(0)
    joined = Speaking(models.CASES["whisper"].build(0).model.encoder, language)
    assert core_model(joined) is language
    assert read_facts(joined).vocabulary == models.CASES["llama"].vocabulary


def test_core_is_what_generates() -> None:
    """Of a pretrained encoder of text and a language model side by side the language model is the core."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=16
    )
    language = models.CASES["llama"].build(0)
    assert core_model(Speaking(transformers.BertModel(config), language)) is language


def test_an_encoder_is_not_the_core_of_a_hand_written_decoder() -> None:
    """A pretrained encoder inside a model that is otherwise hand-written does not speak for the whole."""
    joined = Speaking(models.CASES["whisper"].build(0).model.encoder, HandWritten())
    assert core_model(joined) is joined
    assert (read_facts(joined).model_type, read_facts(joined).vocabulary) == ("", 77)


def test_core_of_a_model_is_itself_and_below_peft_the_model_inside() -> None:
    """The core is never a PeftModel or a tuner."""
    model = models.CASES["llama"].build(0)
    assert core_model(model) is model
    assert core_model(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))) is model


def test_masked_language_models_do_not_shift() -> None:
    """Labels of a masked language model stand at the position of their logits."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=16
    )
    assert read_facts(transformers.BertForMaskedLM(config)).label_shift == 0
