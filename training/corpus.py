"""Read training data and pack it into rows of equal length.

`.txt` files are plain text. `.jsonl` files hold one record per line, in one of three forms:

    {"text": ...}
    {"messages": [{"role", "content"}, ...]}    a message of the assistant may name a `focus`: the part that must be right
    {"ids": [...], "weights": [...]}

`weight` in a record scales all losses of its example. The weight of a token is its weight as a target. Knows nothing of models or
optimizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from pitlane.training.errors import TrainingError

CHUNK = 512  # examples tokenized at a time
OPEN_ROWS = 32  # the last rows, in which `pack` looks for room
MARK = "\ue000"  # stands for the contents when the chat template is rendered without them


@dataclass(frozen=True, slots=True)
class Weighting:
    """Loss weights of a chat's tokens. Tokens of answers weigh 1.

    prompt: weight of the tokens outside the answers. focus: weight of the focus. prompt_sample: share of the tokens outside the
    answers that are trained on, drawn at random. These weigh prompt / prompt_sample: the same loss in expectation, at less cost.
    """

    prompt: float = 1.0
    focus: float = 1.0
    prompt_sample: float = 1.0


class Example(NamedTuple):
    """Token ids and their weights as targets. Plain text may go on in the next row, a chat may not."""

    ids: list[int]
    weights: list[float]
    is_text: bool = False


class Rows(NamedTuple):
    """Packed examples: ids [N, L] int32, weights [N, L] float32."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Join the rows of several files, in order."""
        return cls(np.concatenate([part.ids for part in parts]), np.concatenate([part.weights for part in parts]))

    def split(self, share: float, seed: int) -> tuple[Rows, Rows]:
        """Split into training rows and evaluation rows, at least one row each."""
        number = min(len(self) - 1, max(1, round(len(self) * share)))
        order = np.random.default_rng(seed).permutation(len(self))
        held, kept = np.sort(order[:number]), np.sort(order[number:])
        return Rows(self.ids[kept], self.weights[kept]), Rows(self.ids[held], self.weights[held])


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file."""
    if not path.is_file():
        raise TrainingError(f"no file {path}; give .txt or .jsonl files")
    try:
        if path.suffix != ".jsonl":
            yield {"text": path.read_text(encoding="utf-8")}
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _record(line, path, number)
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is not UTF-8 text ({error}); convert it, or leave it out") from None


def _record(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise TrainingError(f"{path}, line {number}: not JSON ({error})") from None
    if not _is_example(record):
        raise TrainingError(
            f'{path}, line {number}: an example is {{"text": ...}}, {{"messages": [{{"role": ..., "content": ...}}, ...]}} or '
            f'{{"ids": [...], "weights": [...]}}; it reads {line.strip()[:60]!r}'
        )
    example: dict[str, Any] = record
    return example


def _is_example(record: Any) -> bool:
    match record:
        case {"ids": list(ids), "weights": list(weights)}:
            return len(ids) == len(weights)
        case {"messages": [_, *_] as messages}:
            return all(
                isinstance(message, dict) and "role" in message and isinstance(message.get("content"), str)
                for message in messages
            )
        case {"text": str()}:
            return True
    return False


def texts_of(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the plain texts of records, to train a tokenizer on."""
    for record in records:
        if "text" in record:
            yield from record["text"].split("\n")
        for message in record.get("messages", ()):
            yield message["content"]


class Encoder:
    """Turns records into examples, with a tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, weighting: Weighting, seed: int = 0) -> None:
        self.tokenizer, self.weighting = tokenizer, weighting
        self.rng = np.random.default_rng(seed)
        self.closing = self._closing() if tokenizer.chat_template else ""
        self.bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]

    def examples(self, records: Iterable[dict[str, Any]]) -> Iterator[Example]:
        """Yield an example for every record, in order."""
        chunk: list[dict[str, Any]] = []
        for record in records:
            chunk.append(record)
            if len(chunk) == CHUNK:
                yield from self._encode(chunk)
                chunk = []
        if chunk:
            yield from self._encode(chunk)

    def _encode(self, records: Sequence[dict[str, Any]]) -> Iterator[Example]:
        texts, spans_of_texts = [], []
        for record in records:
            text, spans = self._laid_out(record)
            texts.append(text)
            spans_of_texts.append(spans)
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = zip(records, spans_of_texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for record, spans, ids, offsets in rows:
            scale = float(record.get("weight", 1.0))
            if "ids" in record:
                yield Example(record["ids"], [scale * weight for weight in record["weights"]])
            elif "text" in record:
                yield Example(self.bos + ids, [0.0] * len(self.bos) + [scale] * len(ids), is_text=True)
            else:
                yield Example(ids, (scale * self._weights(spans, offsets)).tolist())

    def _laid_out(self, record: dict[str, Any]) -> tuple[str, list[tuple[int, int, float]]]:
        """Return the text of a record and its weighted spans of characters: (start, end, weight)."""
        if "messages" not in record:
            return record.get("text", ""), []
        messages = record["messages"]
        text = self._render(messages)
        frame = self._render([message | {"content": MARK} for message in messages]).split(MARK)
        spans, end = [], 0
        for before, message in zip(frame, messages, strict=False):
            content = message["content"].strip()
            start = text.find(content, end + len(before))
            if start < 0:
                raise TrainingError(
                    f"the chat template does not keep this message as it stands: {content[:60]!r}; leave it out"
                )
            end = start + len(content)
            if message["role"] != "assistant":
                continue
            spans.append((start, end + len(self.closing), 1.0))
            focus = message.get("focus") or ""
            first = text.find(focus, start, end) if focus else -1
            if first >= 0:
                spans.append((first, first + len(focus), self.weighting.focus))
        return text, spans

    def _render(self, messages: Sequence[dict[str, Any]]) -> str:
        if not self.tokenizer.chat_template:
            raise TrainingError("the tokenizer has no chat template, and the data holds chats; give plain text")
        text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False)
        return text

    def _closing(self) -> str:
        """Return the text that the template writes after an answer, such as `<|im_end|>`."""
        probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        return self._render(probe).rpartition("answer")[2].rstrip()

    def _weights(self, spans: list[tuple[int, int, float]], offsets: list[tuple[int, int]]) -> npt.NDArray[np.float32]:
        starts, ends = np.array(offsets).T
        characters = np.zeros(ends.max() + 1, dtype=np.float32)
        for first, last, weight in spans:
            characters[first:last] = weight
        weights = np.maximum(characters[starts], characters[np.maximum(ends - 1, starts)])
        share = self.weighting.prompt_sample
        sampled = self.rng.random(len(weights)) < share
        prompt = np.where(sampled, self.weighting.prompt / share, 0.0)
        weights = np.where(weights > 0, weights, prompt).astype(np.float32)
        weights[0] = 0.0
        return weights


def pack(examples: Iterable[Example], length: int, pad_id: int) -> Rows:
    """Lay examples one after the other into rows of `length` tokens.

    A chat goes whole into the first of the last `OPEN_ROWS` rows with room for it. A chat longer than a row is cut off. A text
    fills the newest row, and goes on in new rows.
    """
    rows: list[tuple[list[int], list[float]]] = []

    def row_with(room: int) -> tuple[list[int], list[float]]:
        oldest = max(0, len(rows) - OPEN_ROWS)
        for row in rows[oldest:]:
            if length - len(row[0]) >= room:
                return row
        rows.append(([], []))
        return rows[-1]

    def lay(row: tuple[list[int], list[float]], ids: list[int], weights: list[float]) -> None:
        row[0].extend(ids)
        row[1].extend(weights)

    for ids, weights, is_text in examples:
        if not is_text:
            lay(row_with(min(len(ids), length)), ids[:length], weights[:length])
            continue
        first = 0
        while first < len(ids):
            if not rows or len(rows[-1][0]) == length:
                rows.append(([], []))
            end = first + length - len(rows[-1][0])
            lay(rows[-1], ids[first:end], weights[first:end])
            first = end
    if not any(any(weights) for _, weights in rows):
        raise TrainingError("the corpus is empty: no token to learn from; check the files and --answers-only")
    ids_array = np.full((len(rows), length), pad_id, dtype=np.int32)
    weights_array = np.zeros((len(rows), length), dtype=np.float32)
    for index, (ids, weights) in enumerate(rows):
        ids_array[index, : len(ids)], weights_array[index, : len(ids)] = ids, weights
    return Rows(ids_array, weights_array)
