"""Prompts from a JSON Lines file, answers to another: in order, one line each, and the same again goes on where it stopped.

A line of prompts is an object with `prompt`, or just the text in quotes; `id` is copied to the answer, and sampling options
(`max_tokens`, `temperature`, ...) hold for that line alone. A line of answers is the document of `run --json` with `line` (the
number in the file of prompts), `id` and `key` (a digest of prompt and options), or with `error` instead of an answer. What a kill
left of a line is taken off and that prompt answered again. So are prompts that failed: the new answers are added at the end, and
when all are there the file is put in order. Knows no model and no terminal.
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

IN_FLIGHT = (
    128  # requests handed to the engine ahead of the one whose answer is written next; twice as many as run at once
)


@dataclass(frozen=True, slots=True)
class Item:
    """One line of prompts. error: why it cannot be one."""

    line: int
    key: str
    prompt: str = ""
    id: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_items(path: Path, options: object) -> list[Item]:
    """All lines that are not blank. options: whatever answers depend on beside the line itself; its repr enters the keys."""
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
        reason = f"{min(unknown)!r} is unknown; known are {known} (what is to be copied goes under id)"
        return Item(number, key, error=reason)
    sampling = {name: value[name] for name in value.keys() - {"prompt", "id"}}
    return Item(number, key, prompt, value.get("id"), sampling)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def sampling_names() -> list[str]:
    """Sampling options that a line may set."""
    return [each.name for each in fields(SamplingParams) if each.name != "sample_index"]


def sampling_of(item: Item, sampling: SamplingParams) -> SamplingParams:
    """The command's sampling options with the line's own. Raises BadOption."""
    return replace(sampling, **item.sampling)


class Answers:
    """The file of answers, open for its next line. No other run may write it meanwhile. todo: the items without an answer."""

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
            found = _Found.read(path, items)
            self.todo = [item for item in items if item.line not in found.answered]
            self._file.truncate(found.size)
        except BaseException:
            self._file.close()
            raise

    def write(self, item: Item, answer: dict[str, Any]) -> None:
        """Add one line, whole; raises BadOption where the disk has no room for it."""
        head = {"line": item.line, **({} if item.id is None else {"id": item.id}), "key": item.key}
        with _writing(self.path):
            self._file.write(json.dumps(head | answer).encode() + b"\n")
            self._file.flush()

    def put_in_order(self, items: list[Item]) -> None:
        """Leave the last line of each item, in the order of the prompts; raises BadOption where the disk has no room for that."""
        path = self.path.resolve()
        found = _Found.read(path, items)
        if found.is_in_order:
            return
        whole = b"".join(line for _, line in sorted(found.lines.items()))
        ordered = path.with_name(path.name + ".ordered")
        with _writing(self.path):
            try:
                ordered.write_bytes(whole)
                shutil.copymode(path, ordered)
                ordered.replace(path)
            finally:
                ordered.unlink(missing_ok=True)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what could not be flushed was said
            self._file.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadOption(f"{path} cannot be written: {error.strerror}; make room and run the same again") from None


@dataclass(slots=True)
class _Found:
    """What a file of answers holds, by the line of the prompt.

    size: bytes of all whole lines; a kill may have left a part of one more.
    """

    lines: dict[int, bytes] = field(default_factory=dict)  # the last of each prompt
    answered: set[int] = field(default_factory=set)  # the others failed
    size: int = 0
    is_in_order: bool = True

    @classmethod
    def read(cls, path: Path, items: list[Item]) -> _Found:
        found, known = cls(), {item.line: item for item in items}
        for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not raw.endswith(b"\n"):
                break
            answer: Any = None
            with suppress(ValueError, RecursionError):
                answer = json.loads(raw)
            line = answer.get("line") if isinstance(answer, dict) else None
            item = known.get(line) if isinstance(line, int) else None
            if item is None or (answer.get("key") != item.key and "error" not in answer):
                raise BadOption(
                    f"{path}: line {number} is no answer to these prompts under these options; "
                    "give another --out, or delete it"
                )
            found._add(item.line, raw, "error" not in answer)
        return found

    def _add(self, line: int, raw: bytes, is_answer: bool) -> None:
        self.is_in_order = self.is_in_order and line > next(reversed(self.lines), 0)
        self.size += len(raw)
        self.lines[line] = raw
        if is_answer:
            self.answered.add(line)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadOption(f"{path} is being written by another run; wait for it, or give another --out") from None


def answer_all(items: list[Item], submit: Callable[[Item], Stream]) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Answer all items; each with its answer or {"error": ...}, in order. submit: may raise PitlaneError."""
    flying: deque[tuple[Item, Stream | str]] = deque()
    for item in items:
        if len(flying) == IN_FLIGHT:
            yield _landed(*flying.popleft())
        flying.append((item, item.error or _submitted(item, submit)))
    while flying:
        yield _landed(*flying.popleft())


def _submitted(item: Item, submit: Callable[[Item], Stream]) -> Stream | str:
    try:
        return submit(item)
    except PitlaneError as error:
        return str(error)


def _landed(item: Item, stream: Stream | str) -> tuple[Item, dict[str, Any]]:
    if isinstance(stream, str):
        return item, {"error": stream}
    try:
        return item, stream.result().to_json()
    except PitlaneError as error:
        return item, {"error": str(error)}
