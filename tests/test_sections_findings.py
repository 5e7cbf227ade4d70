"""How findings are shown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from probe.records import Finding
from probe.sections.blocks import Fact, Facts, Note
from probe.sections.findings import events_section, open_findings
from records_factory import whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

BAD = Finding("loss-off", "critical", "", 1200, "the loss is 4 times too large", advice="Read the cause.", step=1200)
ODD = Finding("module-in-eval-mode", "warning", "encoder", 5, "encoder is in eval mode", advice="Call train().", step=5)


def test_events_with_advice_and_page() -> None:
    """What opens or changes is shown with the message, what to do, and where to read on; the tone is that of the severity."""
    section = events_section(1200, [BAD, replace(ODD, state="changed", step=1200)])
    assert (section.title, section.step) == ("Findings", 1200)
    assert section.blocks == (
        Facts(
            (
                Fact("opened", "critical, loss-off: the loss is 4 times too large", "critical"),
                Fact("  what to do", "Read the cause. (docs/findings.md#loss-off)"),
                Fact("changed", "warning, module-in-eval-mode at encoder, since step 5: encoder is in eval mode", "warning"),
                Fact("  what to do", "Call train(). (docs/findings.md#module-in-eval-mode)"),
            )
        ),
    )


def test_an_end_in_one_line() -> None:
    """What closes needs no advice."""
    (facts,) = events_section(1300, [replace(BAD, state="closed", step=1300)]).blocks
    assert facts == Facts((Fact("closed", "loss-off (critical, since step 1,200)"),))


def test_open_findings_in_a_line_each() -> None:
    """In the order of the record, the first eight of them."""
    told = Finding("encoder-frozen", "info", "encoder", 1, "nothing trains")
    assert open_findings(whisper_record(findings=(BAD, ODD, told))) == (
        Note("critical finding since step 1,200, loss-off: the loss is 4 times too large", "critical"),
        Note("warning finding since step 5, module-in-eval-mode at encoder: encoder is in eval mode", "warning"),
        Note("info finding since step 1, encoder-frozen at encoder: nothing trains", "plain"),
    )
    assert open_findings(whisper_record()) == ()
    assert len(open_findings(whisper_record(findings=(BAD,) * 8))) == 8
    many = open_findings(whisper_record(findings=(BAD,) * 10))
    assert len(many) == 9
    assert many[-1] == Note("and 2 open findings more in the record")
