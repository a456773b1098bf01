"""Prompts from a JSON Lines file, answers to another, in the same order. A second run continues where the first stopped.

A line of prompts is an object with `prompt`, or only the text in quotes. Its `id` is copied to the answer, and its sampling options
(`max_tokens`, `temperature`, ...) hold for this line alone. A line of answers is the document of `run --json` with `line` (the line
number of the prompt), `id` and `key` (a digest of prompt and options); it has `error` in place of an answer that failed.

A killed run may leave a part of a line: it is cut off, and its prompt is answered again. Failed prompts are answered again too.
New answers are appended, and at the end of a run the file is sorted. Knows no model and no terminal.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pitlane import BadOption, PitlaneError, SamplingParams

if TYPE_CHECKING:
    from pitlane import Stream

IN_FLIGHT = 128  # requests submitted before the next answer is written; the engine runs half as many at once


@dataclass(frozen=True, slots=True)
class Item:
    """One line of prompts. error: why the line is not a prompt."""

    line: int
    key: str
    prompt: str = ""
    id: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_items(path: Path, options: object) -> list[Item]:
    """Read all lines that are not blank. options: everything else that answers depend on; its repr enters the keys."""
    if path.is_char_device():
        raise BadOption(f"{path} is a device; write the prompts to a file")
    items = []
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        if raw.strip():
            key = hashlib.sha256(repr(options).encode() + b"\n" + raw.strip()).hexdigest()[:16]
            items.append(_item(number, key, raw))
    if not items:
        raise BadOption(f'{path} holds no prompts; write one per line, as {{"prompt": "..."}}')
    return items


def _item(number: int, key: str, raw: bytes) -> Item:
    try:
        value = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        return Item(number, key, error=f'not a line of JSON ({error}); write {{"prompt": "..."}}')
    value = {"prompt": value} if isinstance(value, str) else value
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        return Item(number, key, error='no prompt; write {"prompt": "..."}')
    unknown = value.keys() - {"prompt", "id"} - set(sampling_names())
    if unknown:
        known = ", ".join(["prompt", "id", *sampling_names()])
        reason = f"{min(unknown)!r} is unknown; known are {known} (put your own data under id)"
        return Item(number, key, error=reason)
    sampling = {name: value[name] for name in value.keys() - {"prompt", "id"}}
    return Item(number, key, prompt, value.get("id"), sampling)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def sampling_names() -> list[str]:
    """Names of the sampling options that a line may set."""
    return [field.name for field in fields(SamplingParams) if field.name != "sample_index"]


def sampling_of(item: Item, sampling: SamplingParams) -> SamplingParams:
    """The sampling options of the command, changed by those of the line. Raises BadOption."""
    return replace(sampling, **item.sampling)


class Answers:
    """The file of answers, open and locked against other runs. todo: the items without an answer."""

    def __init__(self, path: Path, items: list[Item]) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise BadOption(f"{path} cannot hold answers; name a file that can be read again as --out")
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise BadOption(f"{path} cannot be written: {error.strerror}; give another --out") from None
        try:
            _lock(self._file, path)
            contents = _Contents.read(path, items)
            self.todo = [item for item in items if item.line not in contents.answered]
            self._file.truncate(contents.size)
        except BaseException:
            self._file.close()
            raise

    def write(self, item: Item, answer: dict[str, Any]) -> None:
        """Append a line. Raises BadOption if the disk is full."""
        head = {"line": item.line, **({} if item.id is None else {"id": item.id}), "key": item.key}
        with _writing(self.path):
            self._file.write(json.dumps(head | answer).encode() + b"\n")
            self._file.flush()

    def put_in_order(self, items: list[Item]) -> None:
        """Keep the last line of every item, in the order of the prompts. Raises BadOption if the disk is full."""
        path = self.path.resolve()
        contents = _Contents.read(path, items)
        if contents.is_in_order:
            return
        lines = b"".join(line for _, line in sorted(contents.lines.items()))
        ordered = path.with_name(path.name + ".ordered")
        with _writing(self.path):
            try:
                ordered.write_bytes(lines)
                shutil.copymode(path, ordered)
                ordered.replace(path)
            finally:
                ordered.unlink(missing_ok=True)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # `write` has reported that the disk is full
            self._file.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadOption(
            f"{path} cannot be written: {error.strerror}; make room and run the same command again"
        ) from None


@dataclass(slots=True)
class _Contents:
    """Contents of a file of answers, by the line number of the prompt.

    size: bytes of all complete lines; a killed run may have left a part of a line behind them.
    """

    lines: dict[int, bytes] = field(default_factory=dict)  # the last line of every prompt
    answered: set[int] = field(default_factory=set)  # prompts that have an answer, not an error
    size: int = 0
    is_in_order: bool = True

    @classmethod
    def read(cls, path: Path, items: list[Item]) -> _Contents:
        contents, items_by_line = cls(), {item.line: item for item in items}
        for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not raw.endswith(b"\n"):
                break
            answer: Any = None
            with suppress(ValueError, RecursionError):
                answer = json.loads(raw)
            line = answer.get("line") if isinstance(answer, dict) else None
            item = items_by_line.get(line) if isinstance(line, int) else None
            if item is None or (answer.get("key") != item.key and "error" not in answer):
                raise BadOption(
                    f"{path}: line {number} is not an answer to these prompts under these options; "
                    "give another --out, or delete it"
                )
            contents._add(item.line, raw, "error" not in answer)
        return contents

    def _add(self, line: int, raw: bytes, is_answer: bool) -> None:
        self.is_in_order = self.is_in_order and line > next(reversed(self.lines), 0)
        self.size += len(raw)
        self.lines[line] = raw
        if is_answer:
            self.answered.add(line)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadOption(f"{path} is being written by another run; wait for it, or give another --out") from None


def answer_all(items: list[Item], submit: Callable[[Item], Stream]) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Answer all items in order. Yields every item with its answer or `{"error": ...}`. submit: may raise PitlaneError."""
    in_flight: deque[tuple[Item, Stream | str]] = deque()
    for item in items:
        if len(in_flight) == IN_FLIGHT:
            yield _finished(*in_flight.popleft())
        in_flight.append((item, item.error or _submitted(item, submit)))
    while in_flight:
        yield _finished(*in_flight.popleft())


def _submitted(item: Item, submit: Callable[[Item], Stream]) -> Stream | str:
    try:
        return submit(item)
    except PitlaneError as error:
        return str(error)


def _finished(item: Item, stream: Stream | str) -> tuple[Item, dict[str, Any]]:
    if isinstance(stream, str):
        return item, {"error": stream}
    try:
        return item, stream.result().to_json()
    except PitlaneError as error:
        return item, {"error": str(error)}
