"""What the four sections show of hand-made records."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from probe.records import (
    Accuracy,
    AudioSegment,
    Branches,
    Conditioning,
    Head,
    HeadSample,
    Inputs,
    SiteStatistics,
    StepRecord,
)
from probe.sections import attention, inputs, outputs, verification
from probe.sections.blocks import Comparison, Fact, Facts, Note, Section, Table
from probe.sections.reasons import ATTENTION, INPUT, OUTPUT, VERIFICATION, section_of
from records_factory import NO_PROJECTOR, finding, speech_record, text_record, text_sample, whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

SECTIONS: tuple[Callable[[StepRecord], Section], ...] = (inputs.section, outputs.section, attention.section, verification.section)


def strings(section: Section) -> list[str]:
    """Every string of a section, in order."""
    found = [section.title]
    for block in section.blocks:
        if isinstance(block, Facts):
            found += [block.title, *(f"{row.label}: {row.value}" for row in block.rows)]
        elif isinstance(block, Table):
            found += [block.title, block.caption, *(" | ".join(row) for row in block.rows), block.footer]
        elif isinstance(block, Comparison):
            found += [block.title, *(f"{pair.target} {pair.predicted}" for pair in block.pairs)]
        else:
            found.append(block.text)
    return found


def page(section: Section) -> str:
    return "\n".join(strings(section))


def fact(section: Section, label: str) -> Fact:
    rows = [row for block in section.blocks if isinstance(block, Facts) for row in block.rows if row.label.strip() == label]
    assert len(rows) == 1, (label, rows)
    return rows[0]


def table(section: Section, title: str) -> Table:
    found = [block for block in section.blocks if isinstance(block, Table) and title in block.title]
    assert len(found) == 1, (title, strings(section))
    return found[0]


def column(block: Table, name: str) -> list[str]:
    index = [column.name for column in block.columns].index(name)
    return [row[index] for row in block.rows]


@pytest.mark.parametrize("record", [whisper_record(7), speech_record(7), text_record(7)])
def test_titles_steps_and_forms(record: StepRecord) -> None:
    """Each section has its title and step, and every row as many cells as columns."""
    made = [build(record) for build in SECTIONS]
    assert [section.title for section in made] == ["Input", "Output", "Shared attention", "Zero-shot verification"]
    assert {section.step for section in made} == {7}
    for section in made:
        for block in section.blocks:
            if isinstance(block, Table):
                assert {len(row) for row in block.rows} == {len(block.columns)}


@pytest.mark.parametrize("record", [whisper_record(), speech_record(), text_record(), text_record(not_measured={})])
def test_nothing_is_assumed(record: StepRecord) -> None:
    """No section says more than was measured."""
    text = "\n".join(page(build(record)) for build in SECTIONS)
    for word in ("NOT FOUND", "assumed", "HEALTHY", "None", "nan"):
        assert word not in text


@pytest.mark.parametrize("record", [whisper_record(), speech_record(), text_record()])
def test_every_reason_is_shown(record: StepRecord) -> None:
    """No reason is lost: each stands, with "not measured", in a section."""
    text = "\n".join(page(build(record)) for build in SECTIONS)
    for reason in record.not_measured.values():
        assert f"not measured: {reason}" in text


def test_random_reasons_are_shown_in_their_section() -> None:
    """Whatever the key, known or not, exactly the section of its prefix shows the reason; equal reasons stand once, with their number."""
    rng = random.Random(5)
    prefixes = ["inputs", "lm_head", "attention", "audio_encoder", "probe/text", "probe/input", "probe/attention", "grad", "novel", ""]
    keys = {f"{rng.choice(prefixes)}{rng.choice('/:.')}extra{index}": f"reason number {index:03d}" for index in range(60)}
    record = whisper_record(not_measured={**keys, **{f"attention:layer.{index}": "flash attention" for index in range(30)}})
    pages = {build(record).title: page(build(record)) for build in SECTIONS}
    for key, reason in keys.items():
        assert [title for title, text in pages.items() if reason in text] == [section_of(key)], key
    assert pages[ATTENTION].count("flash attention") == 1
    assert "attention:layer.0 and 29 more: not measured: flash attention" in pages[ATTENTION]


def test_section_of_keys() -> None:
    """A prefix counts only as a whole word; what nobody knows goes to the verification."""
    assert section_of("inputs/text") == INPUT
    assert section_of("probe/text/loss") == OUTPUT
    assert section_of("lm_head") == OUTPUT
    assert section_of("attention:model.layers.0.self_attn") == ATTENTION
    assert section_of("audio_encoder") == VERIFICATION
    assert section_of("audio/text") == OUTPUT
    assert section_of("probe/audio_encoder/rms") == VERIFICATION
    assert section_of("attentions") == VERIFICATION
    assert section_of("entirely new") == VERIFICATION


def test_input_shows_each_tensor() -> None:
    """Every input by name with shape, dtype, device, range, and mean or first values."""
    section = inputs.section(whisper_record())
    tensors = table(section, "3 inputs on cuda:0")
    assert tensors.rows[0] == ("input_features", "[2, 80, 3000]", "float32", "-1.5 … 1.812", "0.0132", "")
    assert column(tensors, "first values, notes")[1] == "50258, 50259, 50359, 50363, 264, 1702, …"
    several = table(inputs.section(speech_record()), "3 inputs on several devices")
    assert column(several, "device") == ["cuda:0", "cuda:0", "cpu"]
    assert column(several, "first values, notes")[2] == "3 non-finite values"
    assert column(several, "range") == ["0 … 128,255", "1", "-"]


def test_input_shows_shares_and_audio() -> None:
    """Padding, masked labels, ids outside the vocabulary, and the audio segments: how many, where, how long, what is odd."""
    section = inputs.section(whisper_record())
    assert fact(section, "Padding").value == "23.2 % of token positions"
    assert fact(section, "Labels masked").value == "24.2 % of label positions are -100"
    assert fact(section, "Ids outside vocabulary") == Fact("Ids outside vocabulary", "0 tokens")
    assert fact(section, "Audio") == Fact("Audio", "4 clips, 1 of them constant (silent or empty)", "warning")
    segments = table(section, "2 audio segments")
    assert segments.rows == (("0", "0", "412", "frames", "4.12", ""), ("1", "0", "3,000", "frames", "30.00", "constant"))
    many = inputs.section(speech_record())
    assert fact(many, "Ids outside vocabulary") == Fact("Ids outside vocabulary", "3 tokens", "warning")
    assert len(table(many, "12 audio segments").rows) == 6
    assert table(many, "12 audio segments").footer == "and 6 more in the record"
    assert fact(many, "Step").value == "8 samples in 4 micro-batches, 2 ranks"


def test_input_shows_text_or_ids() -> None:
    """Decoded text with its special tokens; repeated ones counted; ids with the reason where there is no text."""
    text = fact(inputs.section(whisper_record()), "Sample 0 input").value
    assert text.startswith("<|startoftranscript|><|en|>")
    assert text.endswith("<|endoftext|> (13 times)")
    long = fact(inputs.section(speech_record()), "Sample 0 input").value
    assert "<|AUDIO|> (750 times) <|audio_eos|>" in long
    assert len(long) < 600
    assert "characters…]" in long
    record = speech_record(not_measured={"inputs/text": "no tokenizer was given"})
    section = inputs.section(record)
    assert fact(section, "Sample 1 input").value.startswith("ids 0, 1, 2, 3")
    assert fact(section, "Text").value == "not measured: no tokenizer was given"


def test_input_without_anything() -> None:
    """Of inputs that were not seen only the reason stands, marked as missing."""
    section = inputs.section(text_record())
    assert fact(section, "Inputs") == Fact("Inputs", "not measured: the forward was given no tensor", "missing")
    empty = inputs.section(text_record(inputs=Inputs(1, 2), not_measured={"inputs/text": "keep_text=False"}))
    assert fact(empty, "Text").value == "not measured: keep_text=False"
    assert fact(empty, "Padding").value == "not measured: the record gives no reason"


def test_output_shows_heads() -> None:
    """Loss, logits, accuracy and cross-entropy of every head and codebook."""
    section = outputs.section(speech_record())
    assert fact(section, "Loss").value == "31.25"
    accuracies = table(section, "Predictions against labels")
    assert accuracies.rows[0] == ("text_lm_head", "text", "62", "4.587", "48.4 %", "70.0 %", "5.120", "7.1 %", "31.0 %")
    assert accuracies.rows[1][-2:] == ("2.0 %", "20.0 %")
    assert accuracies.rows[2] == ("", "codebook 0", "800", "6.000", "2.1 %", "9.0 %", "6.200", "-", "-")
    assert len(accuracies.rows) == 2 + 8
    logits = table(section, "Logits")
    assert logits.rows[1] == (
        "audio_lm_head", "[2, 812, 8208]", "bfloat16", "cuda:0", "2", "-21 … 19", "-0.2", "0", "shifted by one",
    )  # fmt: skip


def test_output_compares_first_and_last_ten() -> None:
    """Predicted against label tokens, first and last 10, each marked right or wrong; all where there are no more than 20."""
    (sample,) = whisper_record().heads[0].shown
    (comparison,) = [block for block in outputs.section(whisper_record()).blocks if isinstance(block, Comparison)]
    assert [pair.position for pair in comparison.pairs] == [*range(10), *range(27, 37)]
    assert "sample 0, first and last 10 of 37" in comparison.title
    assert not comparison.joined
    for pair in comparison.pairs:
        assert pair.target == str(sample.target[pair.position])
        assert pair.predicted == str(sample.predicted[pair.position])
        assert pair.correct == (sample.target[pair.position] == sample.predicted[pair.position])
    for count in (1, 20, 21):
        shown = (HeadSample(0, tuple(range(count)), tuple(range(count))), HeadSample(1, (1,), (2,)))
        record = whisper_record(heads=(replace(whisper_record().heads[0], shown=shown),))
        (comparison,) = [block for block in outputs.section(record).blocks if isinstance(block, Comparison)]
        assert len(comparison.pairs) == min(count, 20)
        assert ("all" in comparison.title) == (count <= 20)
    section = outputs.section(whisper_record())
    assert fact(section, "Predicted text").value.endswith("fog")
    assert fact(section, "Target text").value.endswith("fox")


def test_output_shows_texts_of_several_samples() -> None:
    """With a tokenizer up to four samples stand as text, predicted over target, each with its hits and its word error rate."""
    head = replace(whisper_record().heads[0], shown=tuple(text_sample(index) for index in range(6)))
    section = outputs.section(whisper_record(heads=(head,)))
    comparisons = [block for block in section.blocks if isinstance(block, Comparison)]
    assert [block.title for block in comparisons] == [
        f"proj_out, sample {index}: 3 of 5 text tokens right, word error rate 66.7 % (teacher-forced)" for index in range(4)
    ]
    assert [pair.predicted for pair in comparisons[0].pairs if not pair.correct] == [" mold", " doorway"]
    assert all(block.joined for block in comparisons)
    assert "Target text" not in page(section)
    cut = replace(text_sample(0), target=tuple(range(100)), predicted=tuple(range(100)), word_error_rate=None)
    section = outputs.section(whisper_record(heads=(replace(head, shown=(cut,)),)))
    (comparison,) = [block for block in section.blocks if isinstance(block, Comparison)]
    assert comparison.title == "proj_out, sample 0: 100 of 100 text tokens right, the first 5 tokens"


@pytest.mark.parametrize(
    ("share", "labelled", "tone"), [(0.93, 62, "warning"), (0.5, 20, "warning"), (0.49, 62, "plain"), (0.9, 19, "plain")]
)
def test_output_names_the_most_frequent_prediction(share: float, labelled: int, tone: str) -> None:
    """What a head predicts most is named, as a warning where it is most of what it predicts; a codebook's stands in the table only."""
    head = whisper_record().heads[0]
    head = replace(head, accuracy=replace(head.accuracy, top_token_share=share, labelled=labelled))
    shown = fact(outputs.section(whisper_record(heads=(head,))), "Most frequent")
    assert (shown.value, shown.tone) == (f"proj_out predicts ' and' at {100 * share:.1f} % of its labelled positions", tone)
    shown = fact(outputs.section(whisper_record(heads=(replace(head, top_token_text=None),))), "Most frequent")
    assert shown.value.startswith("proj_out predicts token 290 at")
    assert "audio_lm_head predicts" not in page(outputs.section(speech_record()))
    unknown = replace(head, accuracy=replace(head.accuracy, top_token_share=None))
    assert "Most frequent" not in page(outputs.section(whisper_record(heads=(unknown,))))


def test_output_says_what_numbers_rest_on() -> None:
    """A head that the model did without says on how many positions it was evaluated."""
    head = replace(whisper_record().heads[0], evaluated="256 sampled of 1,000 labelled positions: fused", shown=())
    assert fact(outputs.section(whisper_record(heads=(head,))), "Numbers").value == f"proj_out: {head.evaluated}"
    assert "Numbers" not in page(outputs.section(whisper_record()))


def test_output_says_what_is_missing() -> None:
    """No head: the reason. A head without labels: its reason. Logits that are not finite: a warning."""
    section = outputs.section(text_record())
    assert fact(section, "LM heads").value == "not measured: the head was not called: the loss is computed by a fused kernel"
    assert fact(section, "Loss").tone == "missing"
    head = Head("lm_head", "text", 1, nonfinite=3)
    section = outputs.section(text_record(heads=(head,), not_measured={"probe/text/loss": "the batch has no labels"}))
    assert fact(section, "lm_head").value == "not measured: the batch has no labels"
    assert Note("lm_head: 3 logits NaN or Inf", "warning") in section.blocks


def test_branches() -> None:
    """Layers that send the same tokens the same way stand once; others each for themselves, with the share of each branch."""
    alike = table(attention.section(speech_record()), "Dual feed-forward")
    assert alike.rows == (("model.base.layers.* (32 layers alike)", "344 tokens", "21.2 %", "1,280 tokens", "78.8 %"),)
    different = (Branches("l.0", 1, 3), Branches("l.1", 0, 0))
    rows = table(attention.section(text_record(branches=different)), "Dual feed-forward").rows
    assert rows == (("l.0", "1 token", "25.0 %", "3 tokens", "75.0 %"), ("l.1", "0 tokens", "-", "0 tokens", "-"))


def test_verification_shows_the_encoder_as_measured() -> None:
    """Called or not, how often, what came out, its spread, what trains, what gradient reached it; rates and norms as numbers."""
    section = verification.section(whisper_record())
    assert fact(section, "Audio encoder") == Fact("Audio encoder", "model.encoder, called 2 times in 2 micro-batches")
    assert fact(section, "output").value == "[2, 1500, 384] float32"
    assert fact(section, "spread over time").value == "0.4123"
    assert fact(section, "spread over batch") == Fact("  spread over batch", "not measured: one clip in every batch", "missing")
    assert fact(section, "trains").value == "100 % of 8.21 M parameters"
    assert fact(section, "gradient").value == "norm 0.00132 reached the output"
    assert fact(section, "Learning rate").value == "1e-05 (2 parameter groups)"
    assert fact(section, "Gradient norm").value == "3.215 before clipping"
    assert fact(section, "projector").value == f"not measured: {NO_PROJECTOR}"
    assert table(section, "What trains").rows[2] == ("rest", "29.6 M", "93.0 %", "2.61", "0.25", "0.002", "12.5 %", "3 of 98")


def test_verification_shows_conditioning() -> None:
    """Audio codes and the chat structure as counts, and no invented ones."""
    section = verification.section(speech_record())
    assert fact(section, "Audio codes").value == "6,400 positions of discrete audio codes in the inputs"
    assert fact(section, "Chat structure").value == "1,500 audio_in_token_id, 812 audio_out_token_id"
    assert fact(section, "trains").value == "0 % of 636 M parameters"
    none = verification.section(speech_record(conditioning=Conditioning("model.audio_tower", 2, audio_codes=0)))
    assert fact(none, "Audio codes").value == "0 positions of discrete audio codes in the inputs"


def test_verification_of_an_encoder_that_was_not_called() -> None:
    """An encoder that never ran, or not in every micro-batch, is a warning, not a failure to measure."""
    record = whisper_record(statistics=(), conditioning=Conditioning("model.encoder", 0, 2))
    assert fact(verification.section(record), "Audio encoder") == Fact(
        "Audio encoder", "model.encoder, not called in 2 micro-batches", "warning"
    )
    record = whisper_record(conditioning=Conditioning("model.encoder", 2, 1))
    shown = fact(verification.section(record), "Audio encoder")
    assert shown.tone == "warning"
    assert shown.value.endswith("left out in 1 micro-batch")


def test_verification_names_values_that_are_not_finite() -> None:
    """NaN or Inf in the output of a site is named with the site and the count; nothing else is claimed of it."""
    row = whisper_record().statistics[0]
    broken = replace(row, nonfinite=7, rms=None, mean=None, std=None, minimum=None, maximum=None, time_std=None)
    section = verification.section(whisper_record(statistics=(broken,)))
    assert Note("model.encoder: 7 of 2,304,000 output values are NaN or Inf", "warning") in section.blocks
    assert fact(section, "size, spread").value == "not measured: 7 values NaN or Inf"


def test_verification_shows_findings_first() -> None:
    """Open findings come before everything else, with code, site and since when."""
    section = verification.section(whisper_record(findings=(finding(),)))
    assert section.blocks[0] == Note(
        "warning finding since step 1, encoder-frozen at model.encoder: no parameter of the encoder trains", "warning"
    )


def test_a_head_without_a_labelled_position() -> None:
    """A head that was scored on nothing says why, by its own reason before that of its modality."""
    head = Head("lm_head", "text", 1, accuracy=Accuracy(0))
    reasons = {"probe/text/loss": "all masked", "probe/text/entropy": "all masked"}
    section = outputs.section(text_record(heads=(head,), not_measured=reasons))
    assert fact(section, "lm_head").value == "not measured: all masked"
    assert page(section).count("all masked") == 1
    section = outputs.section(text_record(heads=(head,), not_measured={**reasons, "head:lm_head": "labels do not lie over logits"}))
    assert fact(section, "lm_head").value == "not measured: labels do not lie over logits"


def test_segments_of_both_units_are_shown() -> None:
    """Runs of placeholder tokens do not crowd out the clips."""
    segments = (*(AudioSegment(0, index, 1, "tokens") for index in range(20)), AudioSegment(0, 0, 300, "frames", 3.0))
    shown = table(inputs.section(whisper_record(inputs=Inputs(1, 1, audio=segments))), "21 audio segments")
    assert column(shown, "unit") == ["tokens"] * 6 + ["frames"]
    assert shown.footer == "and 14 more in the record"


def test_sites_with_a_section_of_their_own_are_not_repeated() -> None:
    """The table of sites holds encoder, projector and the user's own; what is wrong anywhere is named, once."""
    own = SiteStatistics("mine", "custom", 1, (2, 3), "float32", 6)
    layers = tuple(SiteStatistics(f"layers.{index}.attn", "attention", 1) for index in range(20))
    broken = SiteStatistics("lm_head", "lm_head", 1, (2, 3), "float32", 6, nonfinite=2)
    record = whisper_record(
        statistics=(*layers, *whisper_record().statistics, own, broken),
        not_measured={"site:lm_head": "2 NaN or Inf values in its output", "site:other": "attention was not called"},
    )
    section = verification.section(record)
    assert column(table(section, "observed sites"), "site") == ["model.encoder", "mine"]
    assert page(section).count("lm_head: 2 of 6 output values are NaN or Inf") == 1
    assert "2 NaN or Inf values" not in page(section)
    assert fact(section, "site:other").value == "not measured: attention was not called"


def test_sections_load_neither_models_nor_terminal() -> None:
    """Making sections imports none of torch, transformers and rich."""
    code = (
        "import sys; from probe.sections import inputs, outputs, attention, verification;"
        "sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
