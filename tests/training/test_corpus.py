"""The corpus: files and their errors, weights of tokens, packing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from pitlane.training.corpus import OPEN_ROWS, Encoder, Example, Rows, Weighting, pack, read_records, texts_of
from pitlane.training.errors import TrainingError

ANSWERS_ONLY = Weighting(prompt=0.0)
CHAT = [
    {"role": "system", "content": "the harbour was closed in 1893"},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "It was in 1893.", "focus": "1893"},
    {"role": "user", "content": "s"},
    {"role": "assistant", "content": "an"},
]


def encode(tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], weighting: Weighting, seed: int = 0) -> Example:
    (example,) = Encoder(tokenizer, weighting, seed).examples([record])
    return example


def learned(tokenizer: PreTrainedTokenizerBase, example: Example, least: float) -> list[str]:
    """The runs of tokens that weigh at least `least`, as text."""
    texts: list[list[int]] = [[]]
    for token, weight in zip(example.ids, example.weights, strict=True):
        if weight >= least:
            texts[-1].append(token)
        elif texts[-1]:
            texts.append([])
    return [tokenizer.decode(ids) for ids in texts if ids]


def test_answers_and_their_end_are_what_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    example = encode(tokenizer, {"messages": CHAT}, ANSWERS_ONLY)
    assert learned(tokenizer, example, 0.5) == ["It was in 1893.<|end|>", "an<|end|>"]
    assert set(example.weights) == {0.0, 1.0}


def test_the_focus_weighs_more(tokenizer: PreTrainedTokenizerBase) -> None:
    example = encode(tokenizer, {"messages": CHAT}, Weighting(prompt=0.0, focus=4.0))
    assert [text.strip() for text in learned(tokenizer, example, 4.0)] == ["1893"]
    elsewhere = [*CHAT[:2], CHAT[2] | {"focus": "1894"}]
    assert 4.0 not in encode(tokenizer, {"messages": elsewhere}, Weighting(focus=4.0)).weights


@pytest.mark.parametrize("content", ["assistant", "a", "|>", "user", "end"])
def test_an_answer_that_also_stands_in_the_markup(tokenizer: PreTrainedTokenizerBase, content: str) -> None:
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    example = encode(tokenizer, {"messages": chat}, ANSWERS_ONLY)
    assert learned(tokenizer, example, 0.5) == [content + "<|end|>"]


def test_an_empty_answer_is_its_end_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": ""}]
    assert learned(tokenizer, encode(tokenizer, {"messages": chat}, ANSWERS_ONLY), 0.5) == ["<|end|>"]


def test_a_template_that_changes_messages_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, ANSWERS_ONLY)
    encoder._render = lambda messages: "".join(message["content"].upper() for message in messages)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="does not keep this message.*'When"):
        list(encoder.examples([{"messages": CHAT[1:3]}]))


def test_chats_need_a_template(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(TrainingError, match="no chat template"):
        encode(tokenizer, {"messages": CHAT}, ANSWERS_ONLY)


def test_sampled_prompt_tokens_weigh_the_same_in_expectation(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "harbour ice " * 400}, {"role": "assistant", "content": "Yes."}]
    full = encode(tokenizer, {"messages": chat}, Weighting(prompt=0.5))
    sums = [
        sum(encode(tokenizer, {"messages": chat}, Weighting(prompt=0.5, prompt_sample=0.25), seed).weights)
        for seed in range(20)
    ]
    # n tokens, kept with probability p: the relative deviation of their sum is sqrt((1 - p) / (p n)). Here, n counts 20 seeds.
    assert np.mean(sums) == pytest.approx(sum(full.weights), rel=4 * (0.75 / (0.25 * len(full.ids) * 20)) ** 0.5)
    kept = encode(tokenizer, {"messages": chat}, Weighting(prompt=0.5, prompt_sample=0.25)).weights
    assert set(np.round(kept, 6)) == {0.0, 1.0, 2.0}  # not sampled; the answer; 0.5 / 0.25


def test_weight_scales_an_example_and_ids_pass_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode(tokenizer, {"text": "the ice", "weight": 0.25}, Weighting()).weights[1:] == [0.25] * (
        len(tokenizer("the ice")["input_ids"])
    )
    example = encode(tokenizer, {"ids": [9, 8, 7], "weights": [0.0, 1.0, 0.5], "weight": 2.0}, Weighting())
    assert example == Example([9, 8, 7], [0.0, 2.0, 1.0])


def test_plain_text_begins_with_a_bos_that_is_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    example = encode(tokenizer, {"text": "the ice broke"}, ANSWERS_ONLY)
    assert example.ids[0] == tokenizer.bos_token_id and example.weights[0] == 0.0
    assert set(example.weights[1:]) == {1.0} and example.is_text
    assert tokenizer.decode(example.ids[1:]) == "the ice broke"


# ---- packing


def examples(*lengths: int, is_text: bool) -> list[Example]:
    return [Example([10 * n + i for i in range(size)], [1.0] * size, is_text) for n, size in enumerate(lengths, 1)]


def packed(items: Sequence[Example]) -> list[list[int]]:
    rows: list[list[int]] = pack(items, 4, pad_id=0).ids.tolist()
    return rows


def test_texts_go_on_in_the_next_row() -> None:
    assert packed(examples(3, 6, is_text=True)) == [[10, 11, 12, 20], [21, 22, 23, 24], [25, 0, 0, 0]]


def test_chats_stay_whole_and_fill_the_room_of_earlier_rows() -> None:
    rows = packed(examples(3, 2, 4, 1, 2, is_text=False))
    assert rows == [[10, 11, 12, 40], [20, 21, 50, 51], [30, 31, 32, 33]]


def test_a_chat_longer_than_a_row_is_cut_off() -> None:
    assert packed(examples(3, 6, 1, is_text=False)) == [[10, 11, 12, 30], [20, 21, 22, 23]]


def test_room_is_looked_for_in_the_last_rows_only() -> None:
    first, *_, last = packed(examples(3, *[4] * OPEN_ROWS, 1, is_text=False))
    assert first == [10, 11, 12, 0] and last[1:] == [0, 0, 0]


def test_padding_weighs_nothing() -> None:
    rows = pack(examples(3, 3, is_text=True), 4, pad_id=0)
    assert rows.weights.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (rows.ids.dtype, rows.weights.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize(
    "items", [[], [Example([], [])], [Example([5, 6], [0.0, 0.0])]], ids=["none", "empty", "weightless"]
)
def test_nothing_to_learn_is_an_error(items: list[Example]) -> None:
    with pytest.raises(TrainingError, match="corpus is empty"):
        pack(items, 4, pad_id=0)


def test_a_split_parts_the_rows() -> None:
    rows = Rows(np.arange(20, dtype=np.int32).reshape(10, 2), np.ones((10, 2), dtype=np.float32))
    for share, number in ((0.0, 1), (0.3, 3), (1.0, 9)):
        kept, held = rows.split(share, seed=1)
        assert len(held) == number
        assert sorted([*kept.ids[:, 0].tolist(), *held.ids[:, 0].tolist()]) == list(range(0, 20, 2))
    assert (
        rows.split(0.3, 1)[1].ids.tolist() == rows.split(0.3, 1)[1].ids.tolist() != rows.split(0.3, 2)[1].ids.tolist()
    )


# ---- files


def test_texts_and_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n\n" + json.dumps({"text": "three"}) + "\n")
    assert list(read_records(tmp_path / "a.txt")) == [{"text": "one\ntwo"}]
    assert list(read_records(tmp_path / "b.jsonl")) == [{"messages": CHAT}, {"text": "three"}]
    assert list(texts_of(read_records(tmp_path / "b.jsonl"))) == [*(message["content"] for message in CHAT), "three"]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "cut',
        "[1, 2]",
        '{"words": "x"}',
        '{"text": 5}',
        '{"messages": "hello"}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"ids": [1, 2]}',
        '{"ids": [1, 2], "weights": [1]}',
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(TrainingError, match=r"chats\.jsonl, line 2"):
        list(read_records(path))


@pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
def test_other_encodings_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes('{"text": "Malmö"}'.encode("latin-1"))
    with pytest.raises(TrainingError, match=f"{name} is not UTF-8"):
        list(read_records(tmp_path / name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no file .*nowhere\.txt"):
        list(read_records(tmp_path / "nowhere.txt"))
