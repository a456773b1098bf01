"""`pitlane distill` without its command line: a student learns to imitate its teacher, by one of three methods.

kd          the student learns the teacher's distributions on the data (Hinton et al. 2015)
sequence    the teacher answers the prompts of the data, the student trains on these answers (Kim and Rush 2016)
on-policy   the student continues the prompts of the data, the teacher scores each token (Agarwal et al. 2024)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase

from pitlane.training.corpus import read_records
from pitlane.training.errors import TrainingError
from pitlane.training.files import replacing
from pitlane.training.loop import Progress, Report, Settings, use_fast_attention
from pitlane.training.losses import (
    Batch,
    DistillationLoss,
    LabelLoss,
    Loss,
    divergence,
    hidden_states,
    logits_at,
    shared_vocabulary,
)
from pitlane.training.models import check_same_tokenizer, read_model, read_tokenizer, take_layers
from pitlane.training.teacher import teacher_answers
from pitlane.training.train import Data, Output, fit

METHODS = ("kd", "sequence", "on-policy")
TEACHER_FILE = "teacher_answers.jsonl"
MAX_PROMPT = 1024  # tokens


@dataclass(frozen=True, slots=True)
class Method:
    """How to distil.

    temperature: of kd. hard: weight of the data's own labels, for kd and on-policy. beta: kind of divergence (losses.divergence)
    and sampled_tokens: tokens per sample, both of on-policy.
    """

    name: str = "kd"
    temperature: float = 2.0
    hard: float = 0.1
    beta: float = 1.0
    sampled_tokens: int = 32

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise TrainingError(f"no method {self.name!r}; choose {', '.join(METHODS)}")


def sample(model: Model, prompts: Sequence[Sequence[int]], end_id: int, max_tokens: int) -> list[list[int]]:
    """Continue prompts of token ids as one batch, at temperature 1; return the new tokens, up to and including the end token."""
    longest = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    ids = torch.tensor([[end_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    training, model.config._attn_implementation = model.training, "sdpa"
    model.eval()
    try:
        with torch.no_grad():
            rows = model.generate(
                ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                repetition_penalty=1.0, pad_token_id=end_id, eos_token_id=end_id,
            )  # fmt: skip
    finally:
        use_fast_attention(model)
        model.train(training)
    return [row[: row.index(end_id) + 1] if end_id in row else row for row in rows[:, longest:].tolist()]


@dataclass(frozen=True)
class OnPolicyLoss:
    """(1 - hard) D(teacher, student) + hard CE(labels).

    D is taken on tokens that the student samples: every row gives a prompt, and the student continues it.
    """

    teacher: Model
    method: Method
    end_id: int

    def __call__(self, model: Model, batch: Batch, step: int) -> Tensor:
        torch.manual_seed(step)
        prompts = [_prompt(ids, weights, step) for ids, weights in zip(batch.ids, batch.weights, strict=True)]
        answers = sample(model, prompts, self.end_id, self.method.sampled_tokens)
        rows = [([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
        length = max(len(row_ids) for row_ids, _ in rows)
        padded = [row_ids + [self.end_id] * (length - len(row_ids)) for row_ids, _ in rows]
        ids = torch.tensor(padded, device=batch.ids.device)
        places = torch.tensor(
            [
                row * (length - 1) + place
                for row, (row_ids, start) in enumerate(rows)
                for place in range(start - 1, len(row_ids) - 1)
            ],
            device=batch.ids.device,
        )
        student = logits_at(model, hidden_states(model, ids)[0], places)
        with torch.no_grad():
            teacher = logits_at(self.teacher, hidden_states(self.teacher, ids)[0], places)
        loss = divergence(*shared_vocabulary(teacher, student), self.method.beta).mean()
        if not self.method.hard:
            return loss
        return (1 - self.method.hard) * loss + self.method.hard * LabelLoss()(model, batch, step)


def _prompt(ids: Tensor, weights: Tensor, step: int) -> list[int]:
    """Return the tokens before an answer of the row, or the first half of a row without answers.

    A single token of weight 0 does not begin an answer: it is the start of a text.
    """
    answers = (weights >= 1).tolist()
    starts = [place for place in range(2, len(answers)) if answers[place] and not any(answers[place - 2 : place])]
    cut = starts[step % len(starts)] if starts else len(answers) // 2
    return [int(token) for token in ids[max(0, cut - MAX_PROMPT) : cut].tolist()]


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends an answer."""
    if tokenizer.eos_token_id is None:
        raise TrainingError("the tokenizer names no end token (eos_token); add one to its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def write_teacher_answers(teacher: Path, data: Data, output: Output) -> Data:
    """Return the data with a file of the teacher's answers as its only file; a resumed run keeps the file that it has."""
    path = output.folder / TEACHER_FILE
    if not (output.resume and path.is_file()):
        records = [record for file in data.files for record in read_records(file)]
        with (
            replacing(path, str(path), "make room, or choose another --out") as part,
            part.open("w", encoding="utf-8") as lines,
        ):
            for record in teacher_answers(teacher, output.device, records):
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    return replace(data, files=[path])


def distill(
    teacher_folder: Path,
    student: Path | Sequence[int],
    data: Data,
    method: Method,
    settings: Settings,
    output: Output,
    report: Report,
) -> Progress:
    """Distil into a student: a model from a folder, or a new model of the named layers of the teacher."""
    teacher = read_model(teacher_folder).to(output.device).eval().requires_grad_(False)
    use_fast_attention(teacher)
    if isinstance(student, Path):
        check_same_tokenizer(teacher_folder, student)
        model, tokenizer_from = read_model(student), student
    else:
        model, tokenizer_from = take_layers(teacher, student), teacher_folder
    output.prepare()
    if method.name == "sequence":
        data = write_teacher_answers(teacher_folder, data, output)
    loss: Loss
    if method.name == "kd":
        loss = DistillationLoss(teacher, method.temperature, method.hard)
    elif method.name == "on-policy":
        loss = OnPolicyLoss(teacher, method, end_of(read_tokenizer(teacher_folder)))
    else:
        loss = LabelLoss()
    return fit(model.requires_grad_(True), tokenizer_from, data, loss, settings, output, report)
