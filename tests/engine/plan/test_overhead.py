"""The time of hooks that do nothing: 20 plugins with adjust_logits, after_verify and step_finished cost at most 60 us a step."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import pytest
import torch

from pitlane import Draft, Plugin, SamplingParams, hookimpl
from pitlane.engine.decode.rows import split_rows
from pitlane.engine.decode.verify import adjust_logits
from pitlane.engine.events import StepStats
from pitlane.engine.plan.dispatch import Dispatcher
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.planner import Planner
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.sequence import Request, Sequence, Timing

NUM_PLUGINS, LIMIT_US = 20, 60.0
STATS = StepStats(1, 1, 0, 0, 0, 0.001, 0.001)


def idle_plugin(number: int, exactness: str) -> type[Plugin]:
    class Idle(Plugin):
        @hookimpl
        def adjust_logits(self, rows: Any) -> None:
            return None

        @hookimpl
        def after_verify(self, seq: Any, draft: Any, targets: Any, accepted: Any) -> None:
            return None

        @hookimpl
        def step_finished(self, stats: Any) -> None:
            return None

    Idle.name, Idle.exactness = f"idle_{number}", exactness  # type: ignore[assignment]
    return Idle


def plan_of(exactness: str) -> tuple[Plan, Dispatcher]:
    registry = PluginRegistry()
    names = [registry.add(idle_plugin(number, exactness)).name for number in range(NUM_PLUGINS)]
    planner = Planner(registry)
    return planner.resolve({name: {} for name in names}), Dispatcher(planner.resolve)


def make_seq(plan: Plan) -> Sequence:
    nothing: Any = None
    request = Request(num_prompt_tokens=3, sampling=SamplingParams(), seed=1, sample_ids=(0,))
    return Sequence(0, request, plan, [1, 2, 3], nothing, Timing(0.0))


def step_seconds(seq: Any, dispatch: Dispatcher, logits: torch.Tensor) -> float:
    """One step's calls of the three hooks, as the loop makes them."""
    started = perf_counter()
    (rows,) = split_rows(logits, [seq])
    adjust_logits(rows, dispatch)
    plan = seq.plan
    values = {"draft": Draft([1]), "targets": [1, 2], "accepted": [0]}
    dispatch.call([seq], plan.hook("after_verify"), None, None, seq=seq, **values)
    dispatch.call([seq], plan.hook("step_finished"), None, None, stats=STATS)
    dispatch.check_times([seq], 0.001)
    return perf_counter() - started


@pytest.mark.slow
@pytest.mark.parametrize("exactness", ["identical", "steering"])
def test_idle_plugins_cost_at_most_60_us_a_step(exactness: str) -> None:
    """The fastest of many steps: other processes only add time. Minus the same step of a plan without plugins."""
    idle, dispatch = plan_of(exactness)
    bare = Plan((), {})
    seqs = [make_seq(plan) for plan in (bare, idle)]
    logits = torch.randn(1, 512)
    with torch.inference_mode():
        best = [min(step_seconds(seq, dispatch, logits) for _ in range(2000)) for seq in seqs]
    cost = 1e6 * (best[1] - best[0])
    print(f"{exactness}: {cost:.1f} us for {NUM_PLUGINS} plugins")
    assert cost <= LIMIT_US
    assert set(seqs[1].timing.plugin_seconds) == {plugin.name for plugin in idle.plugins}
    assert seqs[1].failed == {}


def test_idle_plugins_change_no_token(make_engine: Any) -> None:
    registry = PluginRegistry()
    names = [registry.add(idle_plugin(number, "identical")).name for number in range(NUM_PLUGINS)]
    engine = make_engine(registry=registry)
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7, seed=2)
    result = engine.generate([1, 2, 3], params, plan=engine.plan({name: {} for name in names}))
    assert result.token_ids == engine.generate([1, 2, 3], params).token_ids
    assert set(result.stats["plugin_ms"]) == set(names) and result.stats["failed"] == {}
