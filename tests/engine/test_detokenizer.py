"""Text as it comes equals text at the end: whole characters, stop strings cut, bounded work."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from pitlane.engine.detokenizer import Detokenizer


class Bytes:
    """One token per byte, as byte-level tokenizers decode; `longest` is the most that was ever decoded at once."""

    longest = 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(token_ids))
        return bytes(token for token in token_ids if token < 256).decode("utf-8", "replace")


class Words:
    """Words that carry their space, of which the first of a text is dropped, as SentencePiece does."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(f" w{token}" for token in token_ids).removeprefix(" ")


def feed(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push([token]) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界 👩‍👩‍👧 é", "👍" * 20, "", "a\ufffdb"])
def test_whole_characters_only(text: str) -> None:
    detokenizer = Detokenizer(Bytes())
    pieces = feed(detokenizer, text.encode())
    assert "".join(pieces) == text == detokenizer.text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_incomplete_character_waits_until_the_end() -> None:
    detokenizer = Detokenizer(Bytes())
    assert [detokenizer.push([byte]) for byte in "é".encode()] == ["", "é"]
    assert detokenizer.push(list("世".encode()[:2])) == ""
    assert detokenizer.flush() == "\ufffd"


def test_spaces_of_a_tokenizer_that_drops_the_first() -> None:
    assert feed(Detokenizer(Words()), [1, 2, 3]) == ["w1", " w2", " w3", ""]


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes(seed: int) -> None:
    """Noise, too, comes out as it would at once, and the tail that is decoded stays short."""
    source = random.Random(seed)
    ids = [source.choice([source.randrange(128), source.randrange(128, 256), 300]) for _ in range(400)]
    tokenizer = Bytes()
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(ids[start : start + 3]) for start in range(0, len(ids), 3))
    assert tokenizer.longest <= 32
    assert text + detokenizer.flush() == tokenizer.decode(ids)


def test_endless_continuation_bytes_and_marks_stay_bounded() -> None:
    for token in (0x80, 0xF0, 300):
        tokenizer = Bytes()
        feed(Detokenizer(tokenizer), [token] * 500)
        assert tokenizer.longest <= 32


@pytest.mark.parametrize(
    ("stop", "text", "kept"),
    [
        (("END",), "some ENDless", "some "),
        (("END",), "EEND", "E"),
        (("aab",), "aaab", "a"),
        (("x", "wxyz"), "vwxyz", "vw"),  # the one that is complete first
        (("é",), "caf\u00e9 au lait", "caf"),
        (("\n\n",), "one\ntwo\n\nthree", "one\ntwo"),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_stop_strings(stop: tuple[str, ...], text: str, kept: str, size: int) -> None:
    detokenizer = Detokenizer(Bytes(), stop)
    ids = list(text.encode())
    got = "".join(detokenizer.push(ids[start : start + size]) for start in range(0, len(ids), size))
    assert detokenizer.stopped
    assert got == detokenizer.text == kept
    assert detokenizer.flush() == ""
    first = min(text.find(one) + len(one) for one in stop if one in text)
    assert detokenizer.num_tokens == len(text[:first].encode())


def test_head_of_a_stop_string_is_held_back_and_flushed() -> None:
    detokenizer = Detokenizer(Bytes(), ("STOP", "OPAL"))
    assert detokenizer.push(list(b"a STO")) == "a "
    assert detokenizer.push(list(b"R")) == "STOR"
    assert detokenizer.push(list(b"OPA")) == ""
    assert detokenizer.flush() == "OPA"
    assert not detokenizer.stopped


def test_stop_string_in_what_is_flushed() -> None:
    detokenizer = Detokenizer(Bytes(), ("\ufffd",))
    assert detokenizer.push([*b"ok", 0xE4]) == "ok"
    assert detokenizer.flush() == ""
    assert detokenizer.stopped
