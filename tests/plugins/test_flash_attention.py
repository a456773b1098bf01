"""With attention and linears in C, no draft and no batch changes a token in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pitlane import SamplingParams
from pitlane.kernels import attention, linear

pytestmark = pytest.mark.skipif(
    bool(linear.unavailable() or attention.unavailable(64)), reason="needs a CPU with AVX2 and a C compiler"
)
TEXT = (Path(__file__).resolve().parents[2] / "LICENSE").read_text()
EXACT: dict[str, dict[str, Any]] = {"packed_linear": {}, "flash_attention": {}}
DRAFTERS: list[dict[str, dict[str, Any]]] = [
    {},
    {"prompt_lookup": {"min_ngram": 1}},
    {"prompt_lookup": {"min_ngram": 1, "num_candidates": 4, "num_draft_tokens": 4}},
    {"speculative": {}},
    {"speculative": {"branching": 2, "num_draft_tokens": 4}},
    {"self_speculation": {}},
    {"jacobi": {}},
    {"lookahead": {}},
]
MODES = pytest.mark.parametrize(
    "mode", [pytest.param({}, id="greedy", marks=pytest.mark.slow), pytest.param({"temperature": 0.8}, id="sampled")]
)


def prompts_of(engine: Any) -> list[list[int]]:
    tokens = engine.tokenizer.encode(TEXT, add_special_tokens=False)
    return [tokens[200 * i :][: 5 + 9 * i] for i in range(len(DRAFTERS))]


def params_of(index: int, mode: dict[str, Any]) -> SamplingParams:
    return SamplingParams(max_tokens=64, seed=index, ignore_eos=True, **mode)


@MODES
@pytest.mark.usefixtures("always_draft")
def test_in_bfloat16_no_drafter_and_no_batch_changes_a_token(make_engine: Any, mode: dict[str, Any]) -> None:
    engine = make_engine("bundled", dtype="bfloat16", plugins=EXACT)
    prompts = prompts_of(engine)
    alone = [engine.generate(prompt, params_of(i, mode)) for i, prompt in enumerate(prompts)]
    for shift in (0, 3):
        plans = [engine.plan(EXACT | DRAFTERS[(i + shift) % len(DRAFTERS)]) for i in range(len(prompts))]
        streams = [engine.submit(p, params_of(i, mode), plan=plans[i]) for i, p in enumerate(prompts)]
        results = [stream.result() for stream in streams]
        assert [r.token_ids for r in results] == [r.token_ids for r in alone]
        assert sum(r.stats["accepted_tokens"] for r in results) > 0
        assert all(r.stats["failed"] == {} for r in results)


def test_head_sizes_without_a_kernel_are_refused() -> None:
    reason = "heads of 48 are no multiple of 32 up to 256"
    assert attention.unavailable(48) == reason
