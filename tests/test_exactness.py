"""The command that writes docs/exactness.md: on one model of each table, since the whole takes minutes."""

from __future__ import annotations

import pytest

from flash_stand_in import VERSION, install

if VERSION < (5, 0):
    pytest.skip("the page is made with the newest transformers", allow_module_level=True)

from benchmarks.exactness import attention, audit, heads, memory
from benchmarks.exactness.page import page


def test_every_kernel_agrees_with_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Llama with padding on the left, each kernel's rows are those of eager attention within 1e-6, and none is missing."""
    install(monkeypatch)
    monkeypatch.setattr(attention.flex_integration, "compile_friendly_flex_attention", attention._flex)
    llama = next(subject for subject in attention._subjects() if subject.name.startswith("Llama"))
    batch = llama.batches()["padding left"]
    for label, kernel in attention.KERNELS.items():
        rows = list(attention._compared(llama, "padding left", batch, label, kernel))
        assert [row.layers for row in rows] == ["decoder"], rows
        assert rows[0].difference is not None, rows[0].note
        assert rows[0].difference < 1e-6
        assert rows[0].shape == (2, 8, 384, 384)


def test_the_page_holds_every_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of one model stand in the page; what could not be had stands there with its reason."""
    monkeypatch.setattr(audit, "MODELS", ("llama",))
    monkeypatch.setattr(heads, "MODELS", ("llama",))
    monkeypatch.setattr(heads, "SIZES", ((1000, 16, 2),))
    monkeypatch.setattr(memory, "SIZES", ((2, 2, 32, 512),))
    missing = attention.AttentionRow("Some model", "all", "sdpa", "none", note="the model cannot run so: no")
    audits, scored, sizes = list(audit.audit_rows()), list(heads.head_rows()), list(heads.size_rows())
    held = list(memory.memory_rows())
    text = page([missing], held, scored, sizes, audits)
    assert "the model cannot run so: no" in text
    assert [row.audit is None for row in audits] == [row.smoothing > 0 and row.head == "never called" for row in audits]
    assert all(abs(row.audit.ratio - 1) < 1e-4 for row in audits if row.audit is not None), audits
    assert all(row.loss_difference < 1e-6 and row.accuracy_difference == 0 for row in scored)
    assert all(row.loss_difference < 1e-6 and row.accuracy_difference == 0 and row.peak_mib < 32 for row in sizes)
    assert all(row.difference < 1e-5 and row.peak_mib < 16 for row in held), held
    assert text.count("\n| llama |") == len(audits) + len(scored)
