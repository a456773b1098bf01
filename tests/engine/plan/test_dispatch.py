"""Hooks that return nonsense: the plugin is named, its request ends or goes on without it, and no other request notices."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from pitlane import (
    Draft,
    Limits,
    ModelError,
    PitlaneError,
    PlainAttention,
    Plugin,
    PluginFailed,
    PluginOptions,
    Rows,
    SamplingParams,
    Sequence,
    hookimpl,
)
from pitlane.engine.plan.registry import PluginRegistry

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
NAN, INF = float("nan"), float("inf")
BAD_PROMPT, GOOD_PROMPT = [7, 1, 2], [8, 1, 2]
WRONG: dict[str, tuple[Any, str]] = {
    "shape": (lambda logits: logits[:, :-1], r"returned a tensor of shape \(\d, 511\), not a tensor of shape"),
    "one row more": (lambda logits: torch.cat([logits, logits[:1]]), "returned a tensor of shape"),
    "whole numbers": (lambda logits: logits.long(), "returned torch.int64 on cpu, not torch.float64 on cpu"),
    "bools": (lambda logits: logits > 0, "returned torch.bool"),
    "complex": (lambda logits: logits.to(torch.complex64), "returned torch.complex64"),
    "another device": (lambda logits: logits.to("meta"), "on meta, not torch.float64 on cpu"),
    "an array": (lambda logits: logits.numpy(), "returned array"),
    "a list": (lambda logits: logits.tolist(), r"returned \[\["),
    "a text": (lambda logits: "none", "returned 'none', not a tensor"),
    "a number": (lambda logits: 0, "returned 0, not a tensor"),
    "nothing to compute with": (lambda logits: NotImplemented, "returned NotImplemented, not a tensor"),
    "nan": (lambda logits: torch.full_like(logits, NAN), "returned logits that hold nan, after token 3"),
    "one nan": (lambda logits: logits.index_fill(1, torch.tensor([5]), NAN), "returned logits that hold nan"),
    "inf": (lambda logits: logits.index_fill(1, torch.tensor([5]), INF), "returned logits that hold inf"),
    "forbidden": (lambda logits: torch.full_like(logits, -INF), "forbids every token, after token 3"),
}


class Adjusts(Plugin):
    """Returns what `WRONG[kind]` makes of the logits; `only_bad`: of the rows whose prompt begins with 7."""

    name, exactness = "adjusts", "steering"

    class Options(PluginOptions):
        kind: str = "nan"
        only_bad: bool = False
        claims: str = "steering"

    @classmethod
    def exactness_for(cls, options: Any) -> Any:
        return options.claims

    @hookimpl
    def adjust_logits(self, rows: Rows) -> Any:
        wrong = WRONG[self.options.kind][0](rows.logits.clone())
        if not self.options.only_bad:
            return wrong
        bad = [row for row, index in enumerate(rows.seq_index) if rows.seqs[index].token_ids[0] == 7]
        rows.logits[bad] = wrong[bad]
        return rows.logits


class Scales(Plugin):
    """Declares itself identical, and is not: at a temperature other tokens are drawn."""

    name, exactness = "scales", "identical"

    class Options(PluginOptions):
        factor: float = 0.3
        in_place: bool = False

    @hookimpl
    def adjust_logits(self, rows: Rows) -> Any:
        if not self.options.in_place:
            return rows.logits * self.options.factor
        rows.logits.mul_(self.options.factor)
        return None


class Grammar(Plugin):
    """Allows even tokens only, and nothing at all behind an odd one, which a draft may hold."""

    name, exactness = "grammar", "steering"

    @hookimpl
    def adjust_logits(self, rows: Rows) -> Any:
        rows.logits[:, 1::2] = -INF
        for row in range(len(rows.parents)):
            if any(token % 2 for token in rows.path(row)):
                rows.logits[row] = -INF
        return rows.logits


class Guesses(Plugin):
    """Drafts what it is told, right at first."""

    name, role, exactness = "guesses", "drafter", "identical"

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self.answer: list[int] = []

    @hookimpl
    def propose(self, seqs: list[Sequence], limits: Limits) -> list[Draft | None]:
        return [Draft([*self.answer[seq.num_completion_tokens :][:2], 1, 2, 3]) for seq in seqs]

    @hookimpl
    def after_verify(self, seq: Sequence, draft: Draft, targets: list[int], accepted: list[int]) -> None:
        assert len(targets) == 1 + len(draft.token_ids)


class Exits(Plugin):
    """Calls sys.exit() in a step."""

    name, exactness = "exits", "steering"

    @hookimpl
    def adjust_logits(self, rows: Rows) -> Any:
        sys.exit(3)


class NoNumbers(Plugin):
    """A model that computes NaN."""

    name, exactness = "no_numbers", "approximate"

    @hookimpl
    def build_op(self, kind: str, context: Any) -> Any:
        return (lambda x: x.chunk(2, -1)[0] * NAN) if kind == "silu_mul" else None


@pytest.fixture
def engine(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No plugin is suspended here: tests/contract/test_bad_plugins.py has the suspension."""
    monkeypatch.setattr("pitlane.engine.plan.suspension.MAX_FAILURES", 1000)
    registry = PluginRegistry()
    for plugin in (Adjusts, Scales, Grammar, Guesses, Exits, NoNumbers):
        registry.add(plugin)
    return make_engine(registry=registry)


def test_nonsense_names_the_plugin_and_ends_its_request_alone(engine: Any) -> None:
    expected = engine.generate(GOOD_PROMPT, PARAMS).token_ids
    neighbour = engine.submit(GOOD_PROMPT, PARAMS)
    for kind, (_, message) in WRONG.items():
        with pytest.raises(PluginFailed, match=f"adjusts.adjust_logits: .*{message}.*take adjusts out of the plan"):
            engine.generate(BAD_PROMPT, PARAMS, plan=engine.plan({"adjusts": {"kind": kind}}))
    assert neighbour.result().token_ids == expected


def test_a_plugin_that_exits_ends_its_request_not_the_engine(engine: Any) -> None:
    neighbour = engine.submit(GOOD_PROMPT, PARAMS)
    with pytest.raises(PluginFailed, match="exits.adjust_logits: SystemExit: 3"):
        engine.generate(BAD_PROMPT, PARAMS, plan=engine.plan({"exits": {}}))
    assert len(neighbour.result().token_ids) == 12


@pytest.mark.parametrize("kind", ["nan", "inf", "forbidden"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_broken_row_ends_its_own_request_not_those_of_the_plan(engine: Any, kind: str, temperature: float) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=temperature, seed=1)
    expected = engine.generate(GOOD_PROMPT, params).token_ids
    plan = engine.plan({"adjusts": {"kind": kind, "only_bad": True}})
    good = engine.submit(GOOD_PROMPT, params, plan=plan)
    with pytest.raises(PluginFailed, match="adjusts.adjust_logits"):
        engine.generate(BAD_PROMPT, params, plan=plan)
    assert good.result().token_ids == expected


@pytest.mark.parametrize("kind", ["nan", "shape"])
def test_one_that_is_declared_identical_is_taken_out(engine: Any, kind: str) -> None:
    plan = engine.plan({"adjusts": {"kind": kind, "claims": "identical"}})
    found, plain = engine.generate(BAD_PROMPT, PARAMS, plan=plan), engine.generate(BAD_PROMPT, PARAMS)
    assert found.token_ids == plain.token_ids and "adjusts.adjust_logits" in found.stats["failed"]["adjusts"]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_false_claim_of_identical_is_seen_and_undone(engine: Any, in_place: bool) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0, seed=3)
    plan = engine.plan({"scales": {"in_place": in_place}})
    found, plain = engine.generate(GOOD_PROMPT, params, plan=plan), engine.generate(GOOD_PROMPT, params)
    assert found.token_ids == plain.token_ids
    assert "declared identical" in found.stats["failed"]["scales"] and found.stats["plugins"] == {}
    honest = engine.generate(GOOD_PROMPT, params, plan=engine.plan({"scales": {"factor": 1.0, "in_place": in_place}}))
    assert honest.token_ids == plain.token_ids and honest.stats["failed"] == {}


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_may_leave_what_a_grammar_allows(engine: Any, temperature: float) -> None:
    """No token may follow an odd one, and none has to: the walk never gets there."""
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=temperature, seed=1)
    expected = engine.generate(GOOD_PROMPT, params, plan=engine.plan({"grammar": {}})).token_ids
    plan = engine.plan({"grammar": {}, "guesses": {}})
    next(plugin for plugin in plan.plugins if plugin.name == "guesses").answer = expected
    found = engine.generate(GOOD_PROMPT, params, plan=plan)
    assert found.token_ids == expected and not any(token % 2 for token in expected)
    assert found.stats["failed"] == {} and found.stats["accepted_tokens"] > 5


@pytest.mark.parametrize("params", [PARAMS, SamplingParams(temperature=0.7, presence_penalty=1.0, logprobs=2)])
def test_a_model_that_computes_no_numbers_is_named(engine: Any, params: SamplingParams) -> None:
    beside = engine.submit(GOOD_PROMPT, PARAMS)
    with pytest.raises(ModelError, match="the model's logits hold nan after token 3; try another --dtype"):
        engine.generate(BAD_PROMPT, params, plan=engine.plan({"no_numbers": {}}))
    assert len(beside.result().token_ids) == 12


def test_nonsense_of_the_model_is_not_blamed_on_a_plugin(engine: Any) -> None:
    with pytest.raises(ModelError):
        engine.generate(BAD_PROMPT, PARAMS, plan=engine.plan({"no_numbers": {}, "scales": {"factor": 1.0}}))


def test_a_part_that_exits_in_the_first_forward_does_not_hang_the_engine(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ExitsFirst(Plugin):
        name, exactness = "exits_first", "rounding"

        @hookimpl
        def build_op(self, kind: str, context: Any) -> Any:
            return (lambda x: sys.exit(3)) if kind == "silu_mul" else None

    registry = PluginRegistry()
    registry.add(ExitsFirst)
    with pytest.raises(PluginFailed, match="exits_first.forward: SystemExit: 3"):
        make_engine(registry=registry, plugins=["exits_first"])
    monkeypatch.setattr(PlainAttention, "__call__", lambda *args: sys.exit(4))
    with pytest.raises(PitlaneError, match="the first forward failed: SystemExit: 4"):
        make_engine(registry=registry)
