"""Plain text: perplexity on held-out files; distinct-n and repetition loops in answers to open prompts.

Perplexity is per token; `bits_per_byte` compares models of different vocabularies. Windows of 512 tokens, after the token that
begins every row, are spread evenly over the file. The last 256 tokens of a window are scored, so that every scored token has at
least 256 tokens before it. Open outputs are judged as token ids without the end token. An early end does not count as an error;
`tokens` is the mean length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from bundled_model.evaluation.answering import Answerer
from bundled_model.evaluation.measures import Row, Rows, distinct, has_loop
from bundled_model.evaluation.prompts import CHATS, OPENINGS

WINDOW = 512
SCORED = 256
NUM_WINDOWS = 64
OPEN_TOKENS = 200
TEMPERATURE = 0.8
TOP_P = 0.95
SEED = 1


def windows(answerer: Answerer, path: Path, number: int) -> list[list[int]]:
    """Return at most `number` windows of a file's tokens, evenly spread. A short text is a single window."""
    start = len(answerer.encode(""))
    token_ids = answerer.encode(path.read_text(encoding="utf-8"))[start:]
    if len(token_ids) <= WINDOW:
        return [token_ids]
    number = min(number, len(token_ids) // SCORED)
    last = len(token_ids) - WINDOW
    starts = [last * index // max(number - 1, 1) for index in range(number)]
    return [token_ids[start : start + WINDOW] for start in starts]


@torch.no_grad()
def perplexity(answerer: Answerer, path: Path, number: int = NUM_WINDOWS) -> Row:
    """Score the text of a file."""
    start = answerer.encode("")
    nats = 0.0
    num_tokens = num_bytes = 0
    for window in windows(answerer, path, number):
        scored = min(SCORED, len(window) - 1)
        row = torch.tensor([start + window])
        logits = answerer.model(input_ids=row, use_cache=False, logits_to_keep=scored + 1).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, row[0, -scored:], reduction="sum"))
        num_tokens += scored
        num_bytes += len(answerer.decode(window[-scored:]).encode())
    return {
        "tokens": num_tokens,
        "perplexity": math.exp(nats / num_tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }


def open_prompts(answerer: Answerer, number: int) -> list[list[int]]:
    """Return `number` prompts, at most 100: alternately a request in a chat without document and an opening of plain text."""
    prompts = []
    for chat, opening in zip(CHATS, OPENINGS, strict=True):
        prompts += [answerer.encode_chat([{"role": "user", "content": chat}]), answerer.encode(opening)]
    return prompts[:number]


def judge(outputs: Sequence[Sequence[int]]) -> Row:
    """Return mean length, number of looping outputs, and distinct-n over all outputs together and as the mean of single outputs."""
    row: Row = {
        "outputs": len(outputs),
        "tokens": sum(map(len, outputs)) / len(outputs),
        "loops": sum(map(has_loop, outputs)),
    }
    for n in (1, 2, 3):
        row[f"distinct_{n}"] = distinct(outputs, n)
        row[f"own_distinct_{n}"] = sum(distinct([output], n) for output in outputs) / len(outputs)
    return row


def open_ended(answerer: Answerer, number: int, show: bool = False) -> Rows:
    """Continue the open prompts by up to 200 tokens, greedily and sampled with a seed."""
    prompts = open_prompts(answerer, number)
    rows = {}
    for name, temperature in (("greedy", 0.0), (f"temperature {TEMPERATURE}", TEMPERATURE)):
        torch.manual_seed(SEED)
        outputs = answerer.generate(prompts, OPEN_TOKENS, temperature, TOP_P, rows=len(prompts))
        outputs = [[token_id for token_id in output if token_id != answerer.end_id] for output in outputs]
        if show:
            for prompt, output in zip(prompts, outputs, strict=True):
                mark = "LOOP" if has_loop(output) else "ok"
                print(f"{mark} {name}: {answerer.decode(prompt)!r} -> {answerer.decode(output)!r}")
        for kind, part in (("all", outputs), ("chat", outputs[::2]), ("text", outputs[1::2])):
            if part:
                rows[f"{name}, {kind}"] = judge(part)
    return rows
