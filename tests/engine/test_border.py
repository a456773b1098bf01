"""The border: a request is checked when it is made, and a refused or failing one harms no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pitlane import BadOption, PitlaneError, SamplingParams, Segment
from pitlane.engine.text.detokenizer import Detokenizer
from pitlane.engine.text.tokenizer import Prompt

NAN, INF, HUGE = float("nan"), float("inf"), 10**30
NO_INTEGER = ["40", 40.0, 1.5, True, [1], "x"]
NO_NUMBER = ["1", None, True, [0.5], 10**400, 1j]


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed", "sample_index", "n", "logprobs"])
@pytest.mark.parametrize("value", NO_INTEGER, ids=str)
def test_only_integers_are_integers(name: str, value: Any) -> None:
    with pytest.raises(BadOption, match=f"^{name} must be an integer") as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "sample_index", "n", "ignore_eos", "temperature", "stop"])
def test_none_is_no_value(name: str) -> None:
    with pytest.raises(BadOption, match=f"^{name} must be .*, got None$"):
        SamplingParams(**{name: None})


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
)
@pytest.mark.parametrize("value", [*NO_NUMBER, NAN, INF, -INF], ids=lambda value: str(value)[:8])
def test_only_finite_numbers_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(BadOption, match=f"^{name} must be .*, got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("max_tokens", HUGE, f"max_tokens must be < 2147483648, got {HUGE}"),
        ("top_k", HUGE, "top_k must be < 2147483648"),
        ("seed", HUGE, r"seed must be in \[0, 2\*\*63\)"),
        ("n", HUGE, r"n must be in \[1, 32\]"),
        ("repetition_penalty", 1e-300, r"repetition_penalty must be in \[0.01, 100\], got 1e-300"),
        ("ignore_eos", 1, "ignore_eos must be true or false, got 1"),
        ("ignore_eos", "no", "ignore_eos must be true or false, got 'no'"),
        ("stop", 5, "stop must be a text or a list of texts, got 5"),
        ("stop", ["a", None], "stop must be a text or a list of texts, got None"),
        ("stop", b"end", "stop must be a text or a list of texts, got b'end'"),
        ("stop", {"a": 1}, "stop must be a text or a list of texts"),
        ("stop", "", "stop must not hold an empty text"),
        ("stop_token_ids", None, "stop_token_ids must be a list of token ids, got None"),
        ("stop_token_ids", 5, "stop_token_ids must be a list of token ids, got 5"),
        ("stop_token_ids", "12", "stop_token_ids must be a list of token ids, got '12'"),
        ("stop_token_ids", [3, 1.5], "stop_token_ids must be a list of token ids, got 1.5"),
        ("stop_token_ids", [True], "stop_token_ids must be a list of token ids, got True"),
    ],
)
def test_other_refusals_show_range_and_value(name: str, value: Any, message: str) -> None:
    with pytest.raises(BadOption, match=f"^{message}"):
        SamplingParams(**{name: value})


def test_a_value_that_cannot_be_shown_is_refused_too() -> None:
    with pytest.raises(BadOption, match="^max_tokens must be < 2147483648, got <int>$"):
        SamplingParams(max_tokens=10**5000)
    with pytest.raises(BadOption, match="^stop must be a text or a list of texts, got .{60}$"):
        SamplingParams(stop=[b"x" * 1000])  # type: ignore[arg-type]


def test_values_of_other_libraries_are_taken_and_become_plain() -> None:
    found = SamplingParams(
        top_k=np.int64(40),
        seed=torch.tensor(7),
        temperature=np.float32(0.5),
        stop_token_ids=np.array([3, 4]),
        stop=["a", "b"],
    )  # type: ignore[arg-type]
    assert found == SamplingParams(top_k=40, seed=7, temperature=0.5, stop_token_ids=(3, 4), stop=("a", "b"))
    assert type(found.top_k) is type(found.seed) is type(found.stop_token_ids[0]) is int
    assert SamplingParams(stop_token_ids={3}, stop="end").stop_token_ids == (3,)  # type: ignore[arg-type]


WRONG_PROMPTS: list[Any] = [
    None,
    5,
    b"bytes",
    [True, False],
    [1.0],
    [1, None],
    [HUGE],
    [10**5000],
    [-1],
    {"a": 1},
    torch.tensor([[1, 2]]),
    Prompt([1, 2], (Segment(0, 99, "hash", "title"),), ""),
    Prompt([1, 2], (Segment(0, 1, "hash", None),), ""),  # type: ignore[arg-type]
    Prompt([1, 2], ("segment",), ""),  # type: ignore[arg-type]
    Prompt(None, (), ""),  # type: ignore[arg-type]
]
WRONG_OPTIONS: list[dict[str, Any]] = [
    {"sampling": None},
    {"sampling": {"max_tokens": 3}},
    {"sampling": SamplingParams(stop_token_ids=(512,))},
    {"sampling": SamplingParams(stop_token_ids=(-1,))},
    {"plan": "prompt_lookup"},
    {"plan": {}},
    {"salt": None},
    {"salt": 5},
    {"salt": "\ud800"},
]


def test_wrong_requests_are_refused_and_their_neighbour_goes_on(engine: Any) -> None:
    neighbour = engine.submit([1, 2, 3], SamplingParams(max_tokens=30, ignore_eos=True))
    for prompt in WRONG_PROMPTS:
        with pytest.raises(BadOption, match="got|integers|is not in"):
            engine.submit(prompt)
    for options in WRONG_OPTIONS:
        with pytest.raises(BadOption, match="got|is not in"):
            engine.submit([1, 2], **options)
        with pytest.raises(BadOption, match="got|is not in"):
            engine.generate([[1, 2], [3]], **options)
    for settings in (None, "prompt_lookup", ["prompt_lookup"], {"prompt_lookup": None}):
        with pytest.raises(BadOption, match="plugins must be"):
            engine.plan(settings)
    assert len(neighbour.result().token_ids) == 30
    assert engine.generate(np.array([1, 2]), SamplingParams(max_tokens=1)).token_ids


@pytest.mark.parametrize("method", ["push", "flush"])
@pytest.mark.filterwarnings("ignore")
def test_what_fails_for_one_request_ends_that_one_alone(
    engine: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    whole = getattr(Detokenizer, method)

    def broken(self: Detokenizer, *arguments: Any) -> Any:
        if self.stop == ("broken",):
            raise ZeroDivisionError("in the middle of a step")
        return whole(self, *arguments)

    monkeypatch.setattr(Detokenizer, method, broken)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    streams = [engine.submit([1, 2, seed], params) for seed in range(3)]
    with pytest.raises(PitlaneError, match="the request failed: ZeroDivisionError: in the middle of a step"):
        engine.generate([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True, stop="broken"))  # type: ignore[arg-type]
    assert [len(stream.result().token_ids) for stream in streams] == [20, 20, 20]
    lane = engine.lane_of(engine.default_plan)
    assert not lane.has_work and lane.pool.num_free_blocks == lane.pool.num_blocks
