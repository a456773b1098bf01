"""The streamed text equals the text of all tokens at once: whole characters, cut before a stop string, bounded work."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pitlane.engine.decode.params import SamplingParams
from pitlane.engine.events import TextDelta
from pitlane.engine.text.byte_tokenizer import END
from pitlane.engine.text.detokenizer import Detokenizer


class Bytes:
    """One token per byte, as byte-level tokenizers decode. longest: the largest number of tokens decoded in one call."""

    longest = 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(token_ids))
        return bytes(token for token in token_ids if token < 256).decode("utf-8", "replace")


class Words:
    """Each word begins with a space. The space of the first word is dropped, as SentencePiece does."""

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


def test_incomplete_character_waits_and_is_left_out_at_the_end() -> None:
    detokenizer = Detokenizer(Bytes())
    assert [detokenizer.push([byte]) for byte in "é".encode()] == ["", "é"]
    assert detokenizer.push(list("世".encode()[:2])) == ""
    assert detokenizer.flush() == ""
    assert detokenizer.text == "é"


def test_spaces_of_a_tokenizer_that_drops_the_first() -> None:
    assert feed(Detokenizer(Words()), [1, 2, 3]) == ["w1", " w2", " w3", ""]


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes(seed: int) -> None:
    """Random bytes decode to the same text step by step as in one call, and each step decodes a short tail."""
    source = random.Random(seed)
    ids = [source.choice([source.randrange(128), source.randrange(128, 256), 300]) for _ in range(400)]
    tokenizer = Bytes()
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(ids[start : start + 3]) for start in range(0, len(ids), 3))
    assert tokenizer.longest <= 32
    assert text + detokenizer.flush() == tokenizer.decode(ids).rstrip("\ufffd")


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
        (("x", "wxyz"), "vwxyz", "vw"),  # x is complete first
        (("é",), "caf\u00e9 au lait", "caf"),
        (("\n\n",), "one\ntwo\n\nthree", "one\ntwo"),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_stop_strings(stop: tuple[str, ...], text: str, kept: str, size: int) -> None:
    detokenizer = Detokenizer(Bytes(), stop)
    ids = list(text.encode())
    answer = "".join(detokenizer.push(ids[start : start + size]) for start in range(0, len(ids), size))
    assert detokenizer.stopped
    assert answer == detokenizer.text == kept
    assert detokenizer.flush() == ""
    end = min(text.find(string) + len(string) for string in stop if string in text)
    assert detokenizer.num_tokens == len(text[:end].encode())
    whole = Detokenizer(Pieces(text.encode()), stop)
    assert whole.push([0]) == kept, "the answer depends on how tokens cut its text"


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_of_few_letters(seed: int) -> None:
    """With stop strings that overlap and repeat, the answer ends before the first complete stop string and loses no text."""
    source = random.Random(seed)
    for _ in range(50):
        stop = tuple("".join(source.choices("ab", k=source.randrange(1, 8))) for _ in range(source.randrange(1, 4)))
        text = "".join(source.choices("ab", k=30))
        ends = [text.find(string) + len(string) for string in stop if string in text]
        detokenizer = Detokenizer(Bytes(), stop)
        pieces = feed(detokenizer, text.encode())
        longest = max((len(string) for string in stop if ends and text[: min(ends)].endswith(string)), default=0)
        assert "".join(pieces) == (text[: min(ends) - longest] if ends else text)
        shown = ""
        for end, piece in enumerate(pieces[:-1], 1):
            shown += piece
            held = text[len(shown) : end]
            assert detokenizer.stopped or any(string.startswith(held) for string in stop)


class CountedReads(str):
    """A text that counts the characters read by index or slice."""

    num_read = 0

    def __getitem__(self, key: Any) -> str:
        part = super().__getitem__(key)
        self.num_read += len(part)
        return part


def test_a_long_stop_string_costs_a_constant_per_character() -> None:
    stop = CountedReads("a" * 4000 + "b")
    text = ("a" * 3999 + "c") * 2
    detokenizer = Detokenizer(Bytes(), [stop])
    assert "".join(feed(detokenizer, text.encode())) == text
    assert stop.num_read < 8 * len(text)


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


class Pieces:
    """Tokens of any bytes; `<|a|>` and `<|b|>` are special."""

    specials = re.compile(r"<\|[ab]\|>")

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        texts = [self.pieces[token] for token in token_ids]
        kept = [text for text in texts if not (skip_special_tokens and text in (b"<|a|>", b"<|b|>"))]
        return b"".join(kept).decode("utf-8", "replace")


@pytest.mark.parametrize("cut", range(1, 19))
def test_an_answer_cut_anywhere_ends_with_a_whole_character(cut: int) -> None:
    data = "aé世🙂👩‍👩".encode()[:cut]
    detokenizer = Detokenizer(Bytes())
    pieces = feed(detokenizer, data)
    assert "".join(pieces) == detokenizer.text == data.decode("utf-8", "ignore")


def test_replacement_characters_stay_inside_a_text_only() -> None:
    assert "".join(feed(Detokenizer(Bytes()), b"a\x80\x80b\xf0")) == "a\ufffd\ufffdb"
    assert "".join(feed(Detokenizer(Bytes()), b"a" + b"\x80" * 50)) == "a"
    stopped = Detokenizer(Bytes(), ("END",))
    assert "".join(feed(stopped, b"a\x80END")) == stopped.text == "a"


def test_a_stop_string_before_half_a_character_stops_at_once() -> None:
    detokenizer = Detokenizer(Pieces(b"go EN", b"D\xf0", b"\x9f\x99\x82"), ("END",))
    assert detokenizer.push([0]) == "go "
    assert detokenizer.push([1]) == ""
    assert detokenizer.stopped and detokenizer.num_tokens == 2
    assert detokenizer.text == "go "


def test_a_special_token_inside_a_character_leaves_it_whole() -> None:
    tokenizer = Pieces(b"x\xf0\x9f", b"<|a|>", b"\x99", b"\x82y\xe4")
    detokenizer = Detokenizer(tokenizer, (), tokenizer.specials)
    assert feed(detokenizer, [0, 1, 1, 2, 1, 3, 1]) == ["x", "", "", "", "", "🙂y", "", ""]


@pytest.mark.parametrize(
    ("stop", "kept", "num_tokens"),
    [
        (("<|a|>",), "one two", 3),
        (("o<|a|>",), "one tw", 3),
        (("<|b|>",), "one two three", 5),
        (("<|a|> three<|b|>",), "one two", 5),
        (("<|a|> nowhere", "three<|b|>"), "one two ", 5),
        (("|> three",), "one two three", 6),  # matches part of a special token only, so special tokens stay hidden
    ],
)
def test_special_tokens_in_stop_strings(stop: tuple[str, ...], kept: str, num_tokens: int) -> None:
    tokenizer = Pieces(b"one", b" two", b"<|a|>", b" three", b"<|b|>", b"")
    detokenizer = Detokenizer(tokenizer, stop, tokenizer.specials)
    pieces = feed(detokenizer, range(6))
    assert "".join(pieces) == detokenizer.text == kept
    assert detokenizer.num_tokens == num_tokens
    assert detokenizer.stopped == (num_tokens < 6)


@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_and_stop_strings(seed: int) -> None:
    """Token by token, the text equals the text of all tokens at once, up to the first stop string."""
    source = random.Random(seed)
    tokenizer = Pieces(
        b"<|a|>", b"<|b|>", b"a", b"b\xf0", b"\x9f\x99\x82", b"\xe4\xb8", b"\x96", "é".encode(), b"ab\xc3", b"\xa9"
    )
    for stop in ((), ("ab",), ("é",), ("<|a|>",), ("a<|b|>", "🙂a")):
        ids = [source.randrange(10) for _ in range(30)]
        detokenizer = Detokenizer(tokenizer, stop, tokenizer.specials)
        pieces = feed(detokenizer, ids)
        with_specials = any("<|" in string for string in stop)
        text = tokenizer.decode(ids, not with_specials)
        places = [text.find(string) for string in stop if string in text]
        expected = tokenizer.specials.sub("", text[: min(places, default=len(text))]).rstrip("\ufffd")
        assert "".join(pieces) == detokenizer.text == expected
        assert detokenizer.stopped == bool(places)


def test_an_answer_stops_at_a_special_token_given_as_a_stop_string(engine: Any) -> None:
    sampling = SamplingParams(max_tokens=40, temperature=9.0, seed=11, ignore_eos=True)
    ids = engine.generate([65], sampling).token_ids
    result = engine.generate([65], replace(sampling, stop=("</s>",)))
    assert END in ids
    assert result.finish_reason == "stop" and result.token_ids == ids[: ids.index(END) + 1]
    assert result.text == engine.tokenizer.decode(result.token_ids).rstrip("\ufffd")


@pytest.mark.parametrize("num_tokens", range(1, 12))
def test_the_streamed_text_is_that_of_the_result_wherever_it_is_cut(engine: Any, num_tokens: int) -> None:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=1.0, seed=7, ignore_eos=True)
    events = list(engine.submit(list("🙂é世".encode()), sampling))
    result = events[-1].result
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == result.text
    assert result.text == engine.tokenizer.decode(result.token_ids).rstrip("\ufffd")
    assert len(result.token_ids) == num_tokens


def test_an_aborted_answer_ends_with_a_whole_character(engine: Any) -> None:
    stream = engine.submit([65], SamplingParams(max_tokens=400, temperature=2.0, seed=3, ignore_eos=True))
    text = ""
    for event in stream:
        if isinstance(event, TextDelta):
            text += event.text
            if event.token_ids:
                stream.abort()
    assert stream.result().text == text and not text.endswith("\ufffd")
