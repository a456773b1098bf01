"""`check_plugin`: an honest plugin passes; for every clause of the contract, a plugin that breaks it fails at this clause."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field

from pitlane import BadOption, Draft, Limits, Plugin, PluginOptions, Rows, Sequence, UnknownPlugin, hookimpl
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.testing import PluginCheck, check_plugin
from pitlane.testing.runs import always_drafting

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def documented(exactness: str, **members: Any) -> type[Plugin]:
    """A plugin class with a whole docstring. members: its attributes and hooks."""
    doc = f"A plugin.\n\nChanges in the loop: none.\nExactness: {exactness}.\nCosts: nothing.\n"
    return type("Made", (Plugin,), {"__doc__": doc, "name": "made", "exactness": exactness, **members})


@pytest.fixture(autouse=True)
def class_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The docstring of the class counts: this module's docstring is about tests."""
    monkeypatch.setattr(sys.modules[__name__], "__doc__", None)


def check(plugin: type[Plugin], options: Any = None, **keywords: Any) -> PluginCheck:
    return check_plugin(plugin, options, **{"num_tokens": 12, "drafters": False, **keywords})


def failed(outcome: PluginCheck) -> list[str]:
    return [finding.clause for finding in outcome.findings if finding.status == "failed"]


def fold(function: Any) -> Any:
    """`adjust_logits` of a plugin from a function of the rows."""

    def adjust_logits(self: Any, rows: Rows) -> Any:
        return function(self, rows)

    return hookimpl(adjust_logits)


def first_at_least(tokens: int) -> Any:
    """Forbid the tokens below `tokens`."""
    return fold(lambda self, rows: rows.logits.index_fill(1, torch.arange(tokens), float("-inf")))


# ---- honest plugins


def test_a_drafter_that_does_not_pay_is_checked_all_the_same() -> None:
    outcome = check_plugin("repeat_last", num_tokens=20, registry=PluginRegistry.load(EXAMPLES))
    assert (outcome.declared, outcome.num_answers, outcome.broken) == ("identical", 24, [])
    assert outcome.proved and outcome.status_of("drafters") == "skipped"
    assert outcome.num_draft_tokens > 100, "a drafter that does not pay is not paused"
    assert outcome.overhead_us is not None and outcome.overhead_us > 0


def test_a_steering_plugin_is_proved_beside_every_drafter() -> None:
    plugin = documented("steering", adjust_logits=first_at_least(100))
    outcome = check(plugin, effect=lambda result: min(result.token_ids) >= 100, num_tokens=24, drafters=True)
    assert outcome.proved, outcome.table()
    detail = next(finding.detail for finding in outcome.findings if finding.clause == "drafters")
    for name in ("prompt_lookup", "speculative", "self_speculation", "jacobi", "lookahead"):
        assert name in detail
    assert "the effect shows in 12 of 12 answers, and in 0 without the plugin" in outcome.table()


def test_an_approximate_plugin_is_measured_and_proved_by_its_bound_alone() -> None:
    outcome = check(documented("approximate", adjust_logits=fold(lambda self, rows: rows.logits * 1.01)))
    assert outcome.passed and not outcome.proved and outcome.status_of("exactness") == "measured"
    share = outcome.moved
    assert share is not None and 1e-5 < share < 0.05
    plugin = documented("approximate", adjust_logits=fold(lambda self, rows: rows.logits * 1.01))
    proved = check(plugin, bound=1.1 * share)
    assert proved.proved and proved.bound == 1.1 * share and f"bound {1.1 * share:.2g})" in proved.verdict
    assert outcome.bound is None and "bound" not in outcome.verdict
    assert failed(check(plugin, bound=0.9 * share)) == ["exactness"]


def test_a_rounding_plugin_is_compared_with_the_rounding_of_the_core() -> None:
    class InBfloat16(Plugin):
        """The last activation in bfloat16 alone, as the core computes it there.

        Changes in the loop: `build_op`.
        Exactness: rounding.
        Costs: nothing.
        """

        name, exactness = "in_bfloat16", "rounding"

        class Options(PluginOptions):
            scale: float = Field(1.0, gt=0, le=2, description="factor of the result")

        @classmethod
        def unavailable(cls, context: Any) -> str | None:
            return None if context.dtype == torch.bfloat16 else "it needs bfloat16"

        @hookimpl
        def build_op(self, kind: str, context: Any) -> Any:
            scale = self.options.scale

            def silu_mul(x: Any) -> Any:
                gate, up = x.float().chunk(2, -1)
                return (torch.nn.functional.silu(gate) * up * scale).to(x.dtype)

            return silu_mul if kind == "silu_mul" else None

    outcome = check(InBfloat16)
    assert outcome.proved and outcome.dtype == "bfloat16", outcome.table()
    assert failed(check(InBfloat16, {"scale": 1.5})) == ["exactness"], "another function"


@pytest.mark.parametrize("bound", [1.0, 1.5, -0.1, float("nan")])
def test_a_bound_that_every_plugin_keeps_is_refused(bound: float) -> None:
    with pytest.raises(BadOption, match="bound must be at least 0 and below 1, got"):
        check(documented("approximate"), bound=bound)


def test_a_plugin_whose_unavailable_raises_fails() -> None:
    def unavailable(cls: Any, context: Any) -> str | None:
        raise KeyError("capability")

    outcome = check(documented("identical", unavailable=classmethod(unavailable)))
    assert not outcome.passed and not outcome.proved
    assert outcome.broken == ["unavailable: made.unavailable() failed in float64: KeyError: 'capability'"]
    absent = check(documented("identical", unavailable=classmethod(lambda cls, context: "no such device")))
    assert absent.passed and absent.status_of("exactness") == "skipped" and "no such device" in absent.table()


def test_the_outcome_as_json_and_as_a_table() -> None:
    outcome = check(documented("steering", adjust_logits=first_at_least(100)))
    record = json.loads(json.dumps(outcome.to_json()))
    assert (record["name"], record["declared"], record["proved"], record["broken"]) == ("made", "steering", True, [])
    assert outcome.table().startswith("made declares steering: proved on this machine (random:tiny, float64)\n  docs")
    outcome.assert_passed()
    outcome.assert_proved()


def test_a_plugin_that_serves_the_host_is_in_no_plan() -> None:
    outcome = check_plugin("text_document")
    assert outcome.passed and not outcome.proved and outcome.status_of("exactness") == "skipped"
    with pytest.raises(AssertionError, match="text_document declares identical: not proved"):
        outcome.assert_proved()


# ---- a plugin for every clause


def test_clause_docs() -> None:
    outcome = check(type("Bare", (Plugin,), {"name": "bare", "exactness": "identical", "__doc__": "No sentence"}))
    assert failed(outcome) == ["docs"]
    for part in ("full stop", "Changes in the loop:", "Exactness: identical", "Costs:"):
        assert part in outcome.broken[0]
    with pytest.raises(AssertionError, match="does not keep its promise"):
        outcome.assert_passed()


class Undescribed(PluginOptions):
    size: int = 3


class AnyValue(PluginOptions):
    model_config: ClassVar[Any] = {"extra": "ignore", "frozen": True}


@pytest.mark.parametrize(
    ("options", "reason"), [(Undescribed, "size has no description"), (AnyValue, "no_such_option=1 is accepted")]
)
def test_clause_options(options: type[PluginOptions], reason: str) -> None:
    outcome = check(documented("identical", Options=options))
    assert failed(outcome) == ["options"] and reason in outcome.broken[0]


def test_clause_hooks() -> None:
    def fails(self: Any, rows: Rows) -> None:
        raise RuntimeError("broken")

    outcome = check(documented("identical", adjust_logits=fold(fails)))
    assert "hooks" in failed(outcome) and "made.adjust_logits: RuntimeError: broken" in str(outcome.broken)


def test_clause_plan() -> None:
    def fails(self: Any, rows: Rows) -> None:
        raise RuntimeError("broken")

    outcome = check(documented("steering", adjust_logits=fold(fails)))
    assert "plan" in failed(outcome) and "made.adjust_logits: RuntimeError: broken" in str(outcome.broken)


def test_clause_drafts() -> None:
    def propose(self: Any, seqs: list[Sequence], limits: Limits) -> list[Draft | None]:
        return [None] * len(seqs)

    outcome = check(documented("identical", role="drafter", propose=hookimpl(propose)))
    assert failed(outcome) == ["drafts"]


def relu_mul(x: Any) -> Any:
    gate, up = x.chunk(2, -1)
    return gate.relu() * up


def test_clause_exactness_of_an_identical_plugin() -> None:
    def build_op(self: Any, kind: str, context: Any) -> Any:
        return relu_mul if kind == "silu_mul" else None

    outcome = check(documented("identical", build_op=hookimpl(build_op)))
    assert failed(outcome) == ["exactness"] and "answer 1 differs at token" in outcome.broken[0]


def test_clause_exactness_of_a_steering_plugin() -> None:
    nothing = documented("steering", adjust_logits=fold(lambda self, rows: rows.logits))
    assert failed(check(nothing)) == ["exactness"]
    plugin = documented("steering", adjust_logits=first_at_least(100))
    assert failed(check(plugin, effect=lambda result: min(result.token_ids) >= 300)) == ["exactness"]
    assert failed(check(plugin, effect=lambda result: True)) == ["exactness"], "an effect that is always there"


def test_clause_two_requests() -> None:
    def adjust_logits(self: Any, rows: Rows) -> Any:
        self.last = rows.seqs[0].token_ids[
            0
        ]  # of the first request of the batch: the answers of the others depend on it
        return rows.logits.index_fill(1, torch.arange(self.last % 7 * 40), float("-inf"))

    assert "two requests" in failed(check(documented("steering", adjust_logits=hookimpl(adjust_logits))))


def test_clause_drafters() -> None:
    def adjust_logits(self: Any, rows: Rows) -> Any:
        allowed = len(rows.parents) % 2  # depends on the number of draft tokens
        return rows.logits.index_fill(1, torch.arange(allowed, 512, 2), float("-inf"))

    outcome = check(documented("steering", adjust_logits=hookimpl(adjust_logits)), drafters=True)
    assert "drafters" in failed(outcome) and "beside the plugin changes the tokens" in str(outcome.broken)


def test_clause_off_again() -> None:
    def lane_opened(self: Any, lane: Any) -> None:
        with torch.inference_mode():
            lane.built.model.norm.mul_(1.5)  # of the model that plans without the plugin use too

    outcome = check(documented("identical", lane_opened=hookimpl(lane_opened)))
    assert "off again" in failed(outcome)


def test_clause_state_of_requests() -> None:
    def sequence_finished(self: Any, seq: Sequence) -> None:
        self.held = [*getattr(self, "held", []), seq]

    outcome = check(documented("identical", sequence_finished=hookimpl(sequence_finished)))
    assert "state of requests" in failed(outcome) and "sequences of finished requests are still held" in outcome.table()


def test_clause_instance() -> None:
    release, held = threading.Event(), []

    def lane_opened(self: Any, lane: Any) -> None:
        held.append(self)
        threading.Thread(target=release.wait, name="left-behind", daemon=True).start()

    outcome = check(documented("identical", lane_opened=hookimpl(lane_opened)))
    release.set()
    assert failed(outcome) == ["instance"]
    assert "threads still run: left-behind" in outcome.broken[0] and "still held" in outcome.broken[0]


def test_clause_process() -> None:
    def step_finished(self: Any, stats: Any) -> None:
        torch.set_default_dtype(torch.float64)

    before = torch.get_default_dtype()
    outcome = check(documented("identical", step_finished=hookimpl(step_finished)))
    assert outcome.broken == ["process: changed torch's default dtype to torch.float64; it was put back"]
    assert torch.get_default_dtype() == before


# ---- the call


def test_an_unknown_name_and_an_engine_are_refused(engine: Any) -> None:
    with pytest.raises(UnknownPlugin, match="unknown plugin 'prompt_lokup'; known: "):
        check_plugin("prompt_lokup")
    with pytest.raises(TypeError, match=r"check_plugin\(MyPlugin"):
        check_plugin(engine, {"prompt_lookup": {}})


def test_the_governor_is_free_again_after_a_check(make_engine: Any) -> None:
    engine = make_engine(registry=PluginRegistry.load(EXAMPLES))
    plan = engine.plan({"repeat_last": {}})
    governor = engine.lane_of(plan).pacing.governor
    with pytest.raises(RuntimeError, match="interrupted"), always_drafting(engine, plan):
        assert governor.fixed == 16
        raise RuntimeError("interrupted")
    assert governor.fixed is None
