"""Train the bundled model: tokenizer, data, training loop, evaluation and export, on a CPU in well under an hour.

Run as `python -m pitlane.plugins.training.train_bundled --out DIR [--minutes 45] [--text FILE ...]`. The schedule goes by
elapsed time, so the cosine ends at the limit whatever the machine. Documents grow longer from stage to stage: copying is
learnt on short ones. Writes a folder that transformers and the engine load. Knows nothing of the engine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pitlane.plugins.training import bundled_tokenizer as tokens
from pitlane.plugins.training.bundled_data import Example, ExampleMaker, Mixture, batches
from pitlane.plugins.training.bundled_init import init_copying
from pitlane.plugins.training.docqa import document_message, make_document, make_turns


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that shapes the run and is worth logging."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4
    intermediate_size: int = 640
    max_length: int = 2048
    batch_tokens: int = 3072
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    warmup: float = 0.02
    prompt_keep: float = 0.15
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    out: Path
    minutes: float
    text: list[Path]
    start: Path | None
    share: float


class Stage(NamedTuple):
    """A mixture and the share of the time at which it ends."""

    until: float
    mixture: Mixture


STAGES = (
    Stage(0.05, Mixture(length=256, min_chars=100, max_chars=260, turns=6, recall_share=0.3)),
    Stage(0.20, Mixture(length=256, min_chars=100, max_chars=260, turns=6, recall_share=0.1)),
    Stage(0.45, Mixture(length=384, min_chars=120, max_chars=500, turns=8)),
    Stage(0.60, Mixture(length=384, min_chars=150, max_chars=500, turns=8, unique_share=0.7)),
    Stage(0.80, Mixture(length=640, min_chars=300, max_chars=1100, turns=10, unique_share=0.7)),
    Stage(1.01, Mixture(length=1024, min_chars=700, max_chars=2000, turns=14, unique_share=0.75)),
)
CONFIG_KEYS = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings attention_bias mlp_bias "
    "initializer_range bos_token_id eos_token_id pad_token_id transformers_version"
).split()
EVAL_CHARS = (250, 1200)
EVAL_SEED = 10**9


def build_model(settings: Settings) -> LlamaForCausalLM:
    """Build a Llama with tied embeddings and random weights."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.hidden_size // 64,
        num_key_value_heads=settings.hidden_size // 128,
        head_dim=64,
        max_position_embeddings=settings.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokens.BOS_ID,
        eos_token_id=tokens.END_ID,
        pad_token_id=tokens.PAD_ID,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    init_copying(model)
    return model


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights in bf16, configs and tokenizer; each file replaces the old one in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    every = model.config.to_dict()
    config = {key: every[key] for key in CONFIG_KEYS}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "rope_theta": every["rope_parameters"]["rope_theta"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = {"bos_token_id": tokens.BOS_ID, "eos_token_id": tokens.END_ID, "pad_token_id": tokens.PAD_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    tokens.save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor, prompt_keep: float) -> Tensor:
    """Return the weighted cross-entropy of ids [B, L] given weights [B, L] of the targets.

    Logits are computed for all answer tokens but only for a random share of the others, which then weigh the more.
    """
    targets, weights = ids[:, 1:].reshape(-1), weights[:, 1:].reshape(-1)
    keep = (weights >= 1) | (torch.rand_like(weights) < prompt_keep)
    scale = torch.where(weights >= 1, 1.0, 1.0 / prompt_keep)
    picked = (keep & (weights > 0)).nonzero().squeeze(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].reshape(len(targets), -1)
        logits = F.linear(hidden[picked], model.lm_head.weight)
    losses = F.cross_entropy(logits.float(), targets[picked], reduction="none")
    picked_weights = (weights * scale)[picked]
    return (losses * picked_weights).sum() / picked_weights.sum()


@torch.no_grad()
def answer_accuracy(model: LlamaForCausalLM, examples: list[Example], batch_size: int = 8) -> float:
    """Return the share of answers that greedy decoding gets right to the last token.

    One forward suffices: greedy decoding gives the answer if and only if each of its tokens is the argmax after the ones before.
    """
    right = total = 0
    for first in range(0, len(examples), batch_size):
        group = examples[first : first + batch_size]
        length = -(-max(len(example.ids) for example in group) // 128) * 128
        ids = torch.tensor([example.ids + [tokens.PAD_ID] * (length - len(example.ids)) for example in group])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            for row, example in zip(hidden, group, strict=True):
                for start, end in example.answers:
                    guess = model.lm_head(row[start - 1 : end - 1]).argmax(-1).tolist()
                    right += guess == example.ids[start:end]
                    total += 1
    return right / max(total, 1)


def held_out(maker: ExampleMaker, chars: int, number: int, unique: bool = False) -> list[Example]:
    """Make examples about documents no training run sees."""
    examples = []
    for index in range(number):
        rng = Random(EVAL_SEED + index)
        document = make_document(rng, chars, unique)
        message = document_message(document.title, document.pages)
        examples.append(maker.conversation(message, make_turns(rng, document, 6)))
    return examples


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms, one schedule by elapsed share."""

    def __init__(self, model: LlamaForCausalLM, settings: Settings) -> None:
        inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
        inner_ids = {id(p) for p in inner}
        outer = [p for p in model.parameters() if id(p) not in inner_ids]
        self.warmup = settings.warmup
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.Muon(inner, lr=settings.muon_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
                settings.muon_lr,
            ),
            (torch.optim.AdamW(outer, lr=settings.adam_lr, betas=(0.9, 0.98), weight_decay=0.0), settings.adam_lr),
        ]

    def step(self, share: float) -> None:
        """Update with the rates that belong to this share of the time, then clear the gradients."""
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        for optimizer, rate in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine * min(1.0, share / self.warmup + 0.01)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Trainer:
    """The loop: batches by stage, steps, log lines, evaluations and checkpoints."""

    def __init__(self, settings: Settings, model: LlamaForCausalLM, maker: ExampleMaker, options: Options) -> None:
        self.settings, self.model, self.maker, self.options = settings, model, maker, options
        self.optimizers = Optimizers(self.model, settings)
        self.eval_sets = {f"{chars} characters": held_out(maker, chars, 24) for chars in EVAL_CHARS}
        self.eval_sets["1200 characters, unique"] = held_out(maker, 1200, 24, unique=True)
        self.eval_sets["recall"] = [maker.recall(Random(EVAL_SEED + index), 256) for index in range(8)]
        self.seconds = options.minutes * 60
        self.start = time.monotonic() - options.share * self.seconds
        self.step = self.num_tokens = 0
        self.losses: list[float] = []

    @property
    def share(self) -> float:
        return (time.monotonic() - self.start) / self.seconds

    def run(self) -> None:
        """Train until the time is up."""
        next_report, next_save = self.share + 0.01, self.share + 0.05
        for stage, source in self._stages():
            if self.share < stage.until:
                print(json.dumps({"stage": asdict(stage.mixture)}), flush=True)
            while self.share < min(1.0, stage.until):
                self._train_step(source)
                if self.share > next_report:
                    next_report = self.share + min(0.1, 90 / self.seconds)
                    self._report()
                if self.share > next_save:
                    next_save = self.share + 180 / self.seconds
                    export(self.model, self.maker.tokenizer, self.options.out)
        self._report()
        export(self.model, self.maker.tokenizer, self.options.out)

    def _stages(self) -> Iterator[tuple[Stage, Iterator[tuple[object, object]]]]:
        for number, stage in enumerate(STAGES):
            rng = Random(self.settings.seed * 1000 + number)
            yield stage, batches(self.maker, rng, stage.mixture, self.settings.batch_tokens)

    def _train_step(self, source: Iterator[tuple[object, object]]) -> None:
        ids, weights = next(source)
        ids, weights = torch.as_tensor(ids), torch.as_tensor(weights)
        loss = weighted_loss(self.model, ids, weights, self.settings.prompt_keep)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step(self.share)
        self.losses.append(loss.item())
        self.step += 1
        self.num_tokens += ids.numel()

    def _report(self) -> None:
        self.model.eval()
        accuracy = {chars: round(answer_accuracy(self.model, rows), 3) for chars, rows in self.eval_sets.items()}
        self.model.train()
        elapsed = time.monotonic() - self.start
        line = {
            "minutes": round(elapsed / 60, 1),
            "step": self.step,
            "tokens": self.num_tokens,
            "tokens_per_second": round(self.num_tokens / (elapsed - self.options.share * self.seconds)),
            "loss": round(sum(self.losses) / max(1, len(self.losses)), 3),
            "accuracy": accuracy,
        }
        self.losses.clear()
        print(json.dumps(line), flush=True)


def tokenizer_texts(texts: list[str]) -> Iterator[str]:
    """Yield what the tokenizer is trained on: generated conversations and a part of the plain texts."""
    for seed in range(4000):
        rng = Random(-seed - 1)
        document = make_document(rng, 500)
        yield document_message(document.title, document.pages)
        for turn in make_turns(rng, document, 6):
            yield turn.question
            yield turn.answer
    for text in texts:
        yield from text[:600_000].split("\n")


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train Pitlane's bundled model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=45.0, help="wall time of the whole training loop")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="plain-text files to mix in")
    parser.add_argument("--start", type=Path, help="go on from the model in this folder instead of from random weights")
    parser.add_argument(
        "--share", type=float, default=0.0, help="share of the minutes that is over already (with --start)"
    )
    return Options(**vars(parser.parse_args()))


def main() -> None:
    """Run the command line."""
    options = parse_options()
    settings = Settings()
    texts = [path.read_text(encoding="utf-8") for path in options.text]
    if options.start:
        tokenizer = Tokenizer.from_file(str(options.start / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    else:
        tokenizer = tokens.train_tokenizer(tokenizer_texts(texts), settings.vocab_size)
        model = build_model(settings)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps(asdict(settings) | {"parameters": num_parameters}), flush=True)
    Trainer(settings, model, ExampleMaker(tokenizer, texts), options).run()


if __name__ == "__main__":
    main()
