"""The few runs that continuous integration makes: two models, of the part that thresholds may be set on."""

from __future__ import annotations

QUICK = frozenset(
    {
        "llama/no-backward",
        "llama/all-labels-masked",
        "llama/padding-learnt",
        "llama/labels-shifted-the-wrong-way",
        "llama/layer-vanishes",
        "whisper/learning-rate-zero",
        "whisper/encoder-without-grad",
        "whisper/features-of-zeros",
        "whisper/whisper-with-accumulation",
        "llama/seed-1",
        "llama/lora",
        "llama/label-smoothing",
        "whisper/seed-1",
    }
)
