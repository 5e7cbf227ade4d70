"""An ordinary script that trains a Whisper on speech with the Hugging Face Trainer, with one line added: ``probe.attach``.

    python finetune_whisper.py                     spoken by espeak-ng, or by our synthesiser where that is not installed
    python finetune_whisper.py --data FOLDER       your recordings: NAME.wav with what is said in NAME.txt

Nothing is downloaded: the model is Whisper's architecture with a small configuration and random weights, its feature extractor is the
real one, and the tokenizer is made from the characters of the texts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    set_seed,
)

import probe
from data_speech import LONGEST_S, Clip, load_speech

LONGEST_TEXT = 448


class SpeechDataset(Dataset[dict[str, Tensor]]):
    """Log-mel features (80, frames) and label ids of each clip."""

    def __init__(self, clips: Sequence[Clip], feature_extractor: WhisperFeatureExtractor, tokenizer: PreTrainedTokenizerBase) -> None:
        self.features = [feature_extractor(clip.samples, sampling_rate=16_000, return_tensors="pt").input_features[0] for clip in clips]
        self.labels = [
            torch.tensor(tokenizer(clip.text, truncation=True, max_length=LONGEST_TEXT).input_ids, dtype=torch.long) for clip in clips
        ]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_features": self.features[index], "labels": self.labels[index]}


@dataclass(frozen=True)
class SpeechCollator:
    """Stacks the features; pads the labels with -100, which the loss leaves out."""

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        labels = torch.nn.utils.rnn.pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=-100)
        return {"input_features": torch.stack([sample["input_features"] for sample in samples]), "labels": labels}


def character_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token a character, from the characters of the texts; every text ends with ``</s>``."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *sorted(set("".join(texts)))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def small_whisper(tokenizer: PreTrainedTokenizerBase, seconds: int) -> WhisperForConditionalGeneration:
    """Build a Whisper of about a million weights that hears clips of ``seconds``."""
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_source_positions=50 * seconds,
        max_target_positions=LONGEST_TEXT,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def main() -> None:
    """Read the arguments, get speech, train, evaluate."""
    args = parse_arguments()
    set_seed(args.seed)
    speech = load_speech(args.data, clips=args.clips, seed=args.seed)
    print(f"Speech: {speech.source}.")
    seconds = math.ceil(min(LONGEST_S, max(clip.seconds for clip in speech.clips)))
    held_out = max(1, len(speech.clips) // 10)
    training_clips, evaluation_clips = speech.clips[:-held_out], speech.clips[-held_out:]

    feature_extractor = WhisperFeatureExtractor(chunk_length=seconds)
    tokenizer = character_tokenizer([clip.text for clip in training_clips])
    model = small_whisper(tokenizer, seconds)
    print(f"Model: Whisper, {model.num_parameters() / 1e6:.1f} million weights, clips of {seconds} s.")

    probe.attach(model, tokenizer=tokenizer, every=args.every)  # <-- the one line added

    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=min(50, args.steps // 4),
            logging_steps=50,
            save_strategy="no",
            report_to=args.report_to,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=SpeechDataset(training_clips, feature_extractor, tokenizer),
        eval_dataset=SpeechDataset(evaluation_clips, feature_extractor, tokenizer),
        data_collator=SpeechCollator(),
        processing_class=feature_extractor,
    )
    trainer.train()
    print(f"Loss on {held_out} clips held out: {trainer.evaluate()['eval_loss']:.3f}")


def parse_arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description="Train a small Whisper on speech, watched by probe.")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="recordings: NAME.wav with what is said in NAME.txt")
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="where the Trainer writes (default: demo-output)")
    parser.add_argument("--clips", type=int, default=400, help="how many sentences to have spoken without --data (default: 400)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: 300)")
    parser.add_argument("--batch-size", type=int, default=8, help="clips a step (default: 8)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="highest learning rate (default: 0.002)")
    parser.add_argument("--every", type=int, default=100, help="look at step 1 and every so many steps (default: 100)")
    parser.add_argument("--report-to", default="none", help="the Trainer's report_to, such as tensorboard (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
