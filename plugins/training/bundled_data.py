"""Training rows of the bundled model: conversations about generated documents, small talk and plain text, as token ids.

A row is several examples laid one after the other up to a fixed length: ids [L] int64 and loss weights [L] float32, where
the weight belongs to the token as a target. Answers weigh most. Knows nothing of the model or the training loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from pitlane.plugins.training import bundled_tokenizer as tokens
from pitlane.plugins.training.docqa import (
    Turn,
    document_message,
    make_document,
    make_small_talk,
    make_system,
    make_turns,
)

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
VALUE_WEIGHT, ANSWER_WEIGHT, RECALL_WEIGHT, PROMPT_WEIGHT, TEXT_WEIGHT = 4.0, 1.0, 1.0, 0.02, 0.1


class Example(NamedTuple):
    """Token ids and their loss weights; `answers` are the half-open ranges of the assistant's tokens."""

    ids: list[int]
    weights: list[float]
    answers: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Row length in tokens, lengths of the documents in characters, and turns behind each of them."""

    length: int
    min_chars: int
    max_chars: int
    turns: int
    recall_share: float = 0.03
    text_share: float = 0.12
    chat_share: float = 0.03
    unique_share: float = 0.0


def answer_weights(answer: str, value: str, offsets: list[tuple[int, int]]) -> list[float]:
    """Weigh the tokens of an answer; those that touch the value weigh most, as only they need the right place found."""
    first = answer.find(value) if value else len(answer)
    last = first + len(value)
    return [VALUE_WEIGHT if start < last and end > first else ANSWER_WEIGHT for start, end in offsets]


class ExampleMaker:
    """Makes examples from a tokenizer and the plain texts."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.newline: list[int] = tokenizer.encode("\n").ids
        self.text_ids: list[list[int]] = [tokenizer.encode(text).ids for text in texts]

    def conversation(self, system: str, turns: Sequence[Turn]) -> Example:
        """Lay out a chat exactly as the chat template does."""
        ids, weights, answers = [tokens.BOS_ID], [0.0], []
        messages = [(tokens.SYSTEM_ID, system, "")] if system else []
        for turn in turns:
            value = turn.fact.value if turn.fact else ""
            messages += [(tokens.USER_ID, turn.question, ""), (tokens.ASSISTANT_ID, turn.answer, value)]
        encoded = self.tokenizer.encode_batch([text for _, text, _ in messages])
        for (role, text, value), content in zip(messages, encoded, strict=True):
            head, body = [role, *self.newline], [*content.ids, tokens.END_ID]
            body_weights = [PROMPT_WEIGHT] * len(body)
            if role == tokens.ASSISTANT_ID:
                answers.append((len(ids) + len(head), len(ids) + len(head) + len(body)))
                body_weights = [*answer_weights(text, value, content.offsets), ANSWER_WEIGHT]
            ids += head + body + self.newline
            weights += [0.0] * len(head) + body_weights + [0.0] * len(self.newline)
        return Example(ids, weights, answers)

    def document(self, rng: Random, target_chars: int, num_turns: int, unique: bool = False) -> Example:
        """Make a conversation about a new document."""
        document = make_document(rng, target_chars, unique)
        system = document_message(document.title, document.pages, make_system(rng))
        return self.conversation(system, make_turns(rng, document, num_turns))

    def plain(self, rng: Random, length: int) -> Example:
        """Cut a window out of one of the plain texts."""
        source = rng.choices(self.text_ids, weights=[len(ids) for ids in self.text_ids])[0]
        start = rng.randrange(max(1, len(source) - length))
        ids = [tokens.BOS_ID, *source[start : start + length - 1]]
        return Example(ids, [0.0] + [TEXT_WEIGHT] * (len(ids) - 1), [])

    def recall(self, rng: Random, length: int) -> Example:
        """Repeat a handful of short token runs in random order: only copying from the context predicts the repeats.

        Copying appears far sooner with such rows mixed in at the start than from documents alone.
        """
        vocab_size = self.tokenizer.get_vocab_size()
        pool = [
            rng.choices(range(len(tokens.SPECIAL_TOKENS), vocab_size), k=rng.randint(3, 12))
            for _ in range(rng.randint(2, 8))
        ]
        ids, weights, seen, repeats = [tokens.BOS_ID], [0.0], set(), []
        while len(ids) < length:
            choice = rng.randrange(len(pool))
            run = pool[choice]
            ids += run
            weights += [0.0] + [RECALL_WEIGHT if choice in seen else 0.0] * (len(run) - 1)
            if choice in seen and len(ids) <= length:
                repeats.append((len(ids) - len(run) + 2, len(ids)))
            seen.add(choice)
        return Example(ids[:length], weights[:length], repeats)

    def example(self, rng: Random, mixture: Mixture) -> Example:
        """Draw one example of the mixture."""
        if rng.random() < mixture.recall_share:
            return self.recall(rng, min(256, mixture.length))
        kind = rng.random()
        if self.text_ids and kind < mixture.text_share:
            return self.plain(rng, mixture.length)
        if kind > 1 - mixture.chat_share:
            return self.conversation("", make_small_talk(rng))
        unique = rng.random() < mixture.unique_share
        return self.document(rng, rng.randint(mixture.min_chars, mixture.max_chars), mixture.turns, unique)


def rows(maker: ExampleMaker, rng: Random, mixture: Mixture) -> Iterator[tuple[Ids, Weights]]:
    """Yield packed rows for ever. Plain text fills a row of its own; the last example of a row is cut off."""
    while True:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < mixture.length:
            example = maker.example(rng, mixture)
            ids += example.ids
            weights += example.weights
        yield np.array(ids[: mixture.length]), np.array(weights[: mixture.length], dtype=np.float32)


def batches(maker: ExampleMaker, rng: Random, mixture: Mixture, batch_tokens: int) -> Iterator[tuple[Ids, Weights]]:
    """Yield batches of about `batch_tokens` tokens: ids [B, L] and weights [B, L]."""
    source = rows(maker, rng, mixture)
    while True:
        picked = [next(source) for _ in range(max(1, batch_tokens // mixture.length))]
        yield np.stack([ids for ids, _ in picked]), np.stack([weights for _, weights in picked])
