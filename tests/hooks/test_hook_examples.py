"""The examples of docs/hooks.md: they cover every hook, and each does what its docstring says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pitlane import Engine, Plugin, PluginRegistry, Result, SamplingParams
from pitlane.engine.plan.hookspecs import SPECS
from pitlane.engine.plan.registry import hooks_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
sys.path.insert(0, str(DOCS))
try:
    from hook_reference import HEADING, anchor, examples, home_of, reference, signature
finally:
    sys.path.remove(str(DOCS))

EXAMPLES = {example.name: example for example in examples()}
IDENTICAL = [name for name, e in EXAMPLES.items() if e.exactness == "identical" and name not in ("tables", "twin")]
PROMPT = [number % 50 for number in range(80)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    registry = PluginRegistry()
    for example in EXAMPLES.values():
        registry.add(example)
    with Engine("random:tiny", dtype="float64", plugins={}, registry=registry) as engine:
        yield engine


def answer(engine: Engine, *names: str, **sampling: Any) -> Result:
    params = SamplingParams(**{"max_tokens": 40, "temperature": 0.8, "seed": 1, "ignore_eos": True, **sampling})
    result = engine.generate(PROMPT, params, plan=engine.plan({name: {} for name in names}))
    assert result.stats["failed"] == {}
    return result


def plugin(engine: Engine, name: str) -> Any:
    return engine.plan({name: {}}).plugins[0]


def test_every_hook_has_an_example_that_is_shown_once() -> None:
    assert {hook for example in examples() for hook in hooks_of(example)} == set(SPECS)
    assert len({home_of(example) for example in examples()}) == len(EXAMPLES)


@pytest.mark.parametrize("name", IDENTICAL)
def test_identical_examples_change_no_token(engine: Engine, name: str) -> None:
    assert [answer(engine, name).token_ids for _ in range(2)] == [answer(engine).token_ids] * 2


@pytest.mark.parametrize("name", ["plain_linear", "torch_norm", "wide_kv"])
def test_rounding_examples_move_no_token_in_float64(engine: Engine, name: str) -> None:
    assert answer(engine, name).token_ids == answer(engine).token_ids


def test_the_others_do_what_they_say(engine: Engine) -> None:
    assert not any(a == b for a, b in pairwise(answer(engine, "no_echo", temperature=2.0).token_ids))
    answer(engine, "stopwatch")
    assert plugin(engine, "stopwatch").seconds > 0
    answer(engine, "counted_attention")
    assert plugin(engine, "counted_attention").num_calls >= 2 * 40
    answer(engine, "counter")
    assert plugin(engine, "counter").num_steps >= 40 and plugin(engine, "counter").num_tokens >= 119
    assert answer(engine, "short_sight").token_ids != answer(engine).token_ids, "the prompt has 80 tokens, 64 are seen"
    weight = engine.lane_of(engine.plan({"round_weights": {}})).built.model.layers[0].down.weight
    assert torch.equal(weight, weight.bfloat16().to(weight.dtype))


@pytest.mark.usefixtures("always_draft")
def test_the_drafter_and_the_cache_of_the_page_work(engine: Engine) -> None:
    first, second = (answer(engine, "successors", temperature=0.0) for _ in range(2))
    assert first.token_ids == second.token_ids and second.stats["notes"]["successors"]["right"] > 0
    assert answer(engine, "first_block").stats["cached_tokens"] in (0, 32)
    assert answer(engine, "first_block").stats["cached_tokens"] == 32


def test_tables_become_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    document = EXAMPLES["tables"]().load_document(str(tmp_path / "a.csv"), "text/csv")  # type: ignore[attr-defined]
    assert document.pages[0].text == "a | b\n1 | 2\n" and len(document.content_hash) == 64
    assert EXAMPLES["tables"]().load_document("a.txt", "text/plain") is None  # type: ignore[attr-defined]


def test_the_generated_part_is_written_anew_and_the_hand_written_part_stays() -> None:
    page = "# Hooks\n\nIntroduction.\n\n## A\n\n### `propose(seqs, limits)`\nBy hand.\n\n### `step_finished(stats)`\nToo.\n"
    once = reference(page)
    assert reference(once) == once, "a second run changes nothing"
    assert once.startswith(
        "# Hooks\n\nIntroduction.\n\n## A\n\n### `propose(seqs, limits)`\nBy hand.\n\n<!-- generated -->"
    )
    assert "class Successors(Plugin)" in once and "class Counter(Plugin)" in once and "[`jacobi`]" in once
    assert HEADING.findall(once) == ["propose", "step_finished"] and "limits: Limits" in signature("propose")
    assert anchor("`step_finished(stats)`") == "step_finishedstats"


def test_example_classes_are_plugins() -> None:
    assert all(issubclass(example, Plugin) and example.__doc__ for example in EXAMPLES.values())
