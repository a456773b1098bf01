"""Plans: what may stand together, options, keys, hooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from pitlane import (
    BadOption,
    BuildContext,
    ModelError,
    PlanConflict,
    Plugin,
    PluginFailed,
    PluginOptions,
    UnknownPlugin,
    file_hash,
    hookimpl,
)
from pitlane.engine.plan.hooks import Hook, HookError, call
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.planner import NUM_RECENT, Planner
from pitlane.engine.plan.plugin import Exactness
from pitlane.engine.plan.registry import PluginRegistry


class Chain(Plugin):
    """Drafts chains."""

    name, role, exactness, stage = "chain", "drafter", "identical", 5

    class Options(PluginOptions):
        length: int = Field(4, ge=1, le=16)
        share: float = 0.5
        eager: bool = False

    @hookimpl
    def propose(self, limits: Any) -> Any:
        return self.options.length


class Tree(Plugin):
    """Drafts trees."""

    name, role, exactness = "tree", "drafter", "identical"

    @hookimpl
    def propose(self, seqs: Any, limits: Any) -> Any:
        return None


class Packed(Plugin):
    """Builds linears; exact at 16 bits only."""

    name, role, exactness = "packed", "linear", "identical"

    class Options(PluginOptions):
        bits: int = 8

    @classmethod
    def exactness_for(cls, options: Any) -> Exactness:
        return "identical" if options.bits == 16 else "approximate"

    @hookimpl
    def build_linear(self, part: Any, context: Any) -> None:
        raise BadOption("group_size must divide in_features")


class Ban(Plugin):
    """Steers."""

    name, exactness, requires, conflicts, stage = "ban", "steering", ("packed",), ("tree",), -1

    @hookimpl
    def adjust_logits(self, rows: Any) -> Any:
        raise BadOption("a named error")

    @staticmethod
    @hookimpl
    def step_finished(stats: Any) -> None:
        raise ZeroDivisionError("steps")


class Reader(Plugin):
    """Serves the host."""

    name, exactness = "reader", "identical"

    @hookimpl
    def load_document(self, path: str) -> Any:
        return path


class Costly(Plugin):
    """Counts its instances, and may fail to start."""

    name, exactness = "costly", "identical"
    made = 0
    closed: ClassVar[list[int]] = []

    class Options(PluginOptions):
        broken: bool = False
        number: int = -1

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        type(self).made += 1
        if self.options.broken:
            raise OSError("no such device")

    def close(self) -> None:
        self.closed.append(self.options.number)


@pytest.fixture
def registry() -> PluginRegistry:
    registry = PluginRegistry()
    for plugin in (Chain, Tree, Packed, Ban, Reader, Costly):
        registry.add(plugin)
    return registry


@pytest.fixture
def planner(registry: PluginRegistry) -> Planner:
    return Planner(registry)


# ---- what may stand together


def test_a_role_has_one_holder(planner: Planner) -> None:
    with pytest.raises(PlanConflict, match=r"^drafter is held by chain; take it out to enable tree$"):
        planner.resolve({"chain": {}, "tree": {}})
    assert planner.resolve({"chain": {}, "packed": {}}).names == ["packed", "chain"]


def test_what_is_required_must_be_there(planner: Planner) -> None:
    with pytest.raises(PlanConflict, match=r"^ban requires packed; enable it too$"):
        planner.resolve({"ban": {}})
    assert planner.resolve({"ban": {}, "packed": {}}).names == ["ban", "packed"]


@pytest.mark.parametrize("order", [("ban", "packed", "tree"), ("tree", "packed", "ban")])
def test_a_conflict_is_refused_whatever_the_order(planner: Planner, order: Sequence[str]) -> None:
    with pytest.raises(PlanConflict, match=r"^ban cannot run with tree; take one of them out$"):
        planner.resolve({name: {} for name in order})


def test_a_refused_plan_is_refused_again(planner: Planner) -> None:
    for _ in range(2):
        with pytest.raises(PlanConflict):
            planner.resolve({"ban": {}})


def test_an_unknown_plugin_lists_the_known(planner: Planner) -> None:
    with pytest.raises(UnknownPlugin, match="unknown plugin 'chian'; known: ban, chain, costly, packed, tree"):
        planner.resolve({"chian": {}})


def test_what_serves_the_host_is_no_part_of_a_plan(planner: Planner) -> None:
    with pytest.raises(BadOption, match="reader is always on and belongs to no plan"):
        planner.resolve({"reader": {}})


def test_a_plugin_that_cannot_start_is_a_named_error(planner: Planner) -> None:
    for _ in range(2):
        with pytest.raises(PluginFailed, match="costly cannot start: OSError: no such device"):
            planner.resolve({"costly": {"broken": True}})
    assert not planner._plugins


# ---- options


def test_options_come_as_text_from_a_command_line(planner: Planner) -> None:
    plan = planner.resolve({"chain": {"length": "7", "share": "0.25", "eager": "true"}})
    assert plan.settings == {"chain": {"length": 7, "share": 0.25, "eager": True}}
    assert plan is planner.resolve({"chain": {"length": 7, "share": 0.25, "eager": True}})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lenght": 7}, "chain has no option 'lenght'; its options are: length, share, eager"),
        ({"length": "many"}, "chain.length = 'many': .*integer"),
        ({"length": 17}, "chain.length = 17: .*less than or equal to 16"),
        ({"eager": "perhaps"}, "chain.eager = 'perhaps': .*boolean"),
    ],
)
def test_a_bad_option_is_named_with_its_value(planner: Planner, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=f"^{message}"):
        planner.resolve({"chain": options})


def test_a_plugin_without_options_says_so(planner: Planner) -> None:
    with pytest.raises(BadOption, match="tree has no option 'depth'; its options are: none"):
        planner.resolve({"tree": {"depth": 1}})


# ---- identity


def test_equal_settings_give_the_same_plan_and_instance(planner: Planner) -> None:
    plan = planner.resolve({"chain": {}, "packed": {}})
    assert plan is planner.resolve({"packed": {"bits": 8}, "chain": {"length": 4}})
    alone = planner.resolve({"chain": {}})
    assert alone is not plan and alone.plugins[0] is plan.plugins[1]
    other = planner.resolve({"chain": {"length": 5}})
    assert other is not alone and other.plugins[0] is not alone.plugins[0]
    assert planner.resolve({}) is planner.resolve({}) and planner.resolve({}).plugins == ()


def test_asking_again_makes_no_new_instance(planner: Planner) -> None:
    """A new instance may open files and start threads."""
    Costly.made = 0
    for names in ([], ["chain"], ["tree"], []):
        planner.resolve({name: {} for name in ["costly", *names]})
    assert Costly.made == 1


def test_an_instance_is_closed_once_after_its_last_plan(planner: Planner) -> None:
    Costly.closed.clear()
    plans = [planner.resolve({"costly": {}}), planner.resolve({"costly": {}, "chain": {}})]
    for number in range(40):
        planner.resolve({"costly": {"number": number}})
    assert len(planner._plugins) <= NUM_RECENT + 2 and sorted(Costly.closed) == list(range(31, -1, -1))[::-1]
    assert 0 in Costly.closed and 39 not in Costly.closed and -1 not in Costly.closed, (
        "two plans hold the first instance"
    )
    del plans[0]
    planner.resolve({})
    assert -1 not in Costly.closed
    plans.clear()
    planner.resolve({"tree": {}})
    planner.close()
    assert sorted(Costly.closed) == list(range(-1, 40)), "each instance once"


def test_order_is_by_stage_then_name(planner: Planner) -> None:
    assert planner.resolve({"chain": {}, "packed": {}, "costly": {}, "ban": {}}).names == [
        "ban",
        "costly",
        "packed",
        "chain",
    ]


def test_keys_hold_what_weights_and_kv_depend_on(planner: Planner) -> None:
    bare, drafted = planner.resolve({}), planner.resolve({"chain": {}})
    assert bare.variant_key == drafted.variant_key == bare.lane_key == drafted.lane_key == drafted.kv_key == ()
    eight, four = planner.resolve({"packed": {}}), planner.resolve({"packed": {"bits": 4}})
    assert eight.variant_key == eight.lane_key == eight.kv_key == ('packed@1{"bits":8}',)
    assert len({bare.lane_key, eight.lane_key, four.lane_key}) == 3
    assert planner.resolve({"packed": {}, "chain": {}, "ban": {}}).lane_key == eight.lane_key
    exact = planner.resolve({"packed": {"bits": 16}})
    assert exact.lane_key != eight.lane_key and exact.kv_key == (), "its KV is that of the plain core"


@pytest.mark.parametrize(
    "settings, exactness",
    [
        ({}, "identical"),
        ({"chain": {}}, "identical"),
        ({"packed": {"bits": 16}}, "identical"),
        ({"packed": {}, "chain": {}}, "approximate"),
        ({"packed": {}, "ban": {}}, "steering"),
    ],
)
def test_a_plan_is_as_exact_as_its_weakest_part(planner: Planner, settings: Any, exactness: str) -> None:
    assert planner.resolve(settings).exactness == exactness


# ---- hooks


def call_hook(plan: Plan, name: str, check: Any = None, **values: Any) -> tuple[Any, list[str], list[HookError]]:
    """The answer, the names of the plugins that were charged, and the failures."""
    spent: list[tuple[Hook, float]] = []
    failures: list[HookError] = []
    answer = call(plan.hook(name), spent, failures.append, check, **values)
    assert all(seconds > 0 for _, seconds in spent), "a failing call takes time too"
    return answer, [hook.plugin.name for hook, _ in spent], failures


def test_a_hook_gets_the_arguments_that_it_names_and_its_plugin_is_charged(planner: Planner) -> None:
    plan = planner.resolve({"chain": {"length": 3}})
    answer, charged, failures = call_hook(plan, "propose", seqs=[], limits=None)
    assert (answer.value, answer.plugin, charged, failures) == (3, plan.plugins[0], ["chain"], [])
    assert call_hook(plan, "match_prefix", seq=0, lane=0) == (None, [], [])


def test_a_failure_in_a_step_names_the_plugin_even_if_the_error_has_a_name(planner: Planner) -> None:
    """A PitlaneError of a step hook would reach requests that have nothing to do with the plugin."""
    plan = planner.resolve({"ban": {}, "packed": {}})
    _, charged, (failure,) = call_hook(plan, "adjust_logits", rows=None)
    assert str(failure) == "ban.adjust_logits: BadOption: a named error" and charged == ["ban"]
    assert failure.plugin is plan.plugins[0] and isinstance(failure.__cause__, BadOption)
    _, _, (failure,) = call_hook(plan, "step_finished", stats=None)
    assert str(failure) == "ban.step_finished: ZeroDivisionError: steps"


def test_the_plugin_that_answers_is_named_and_a_refused_answer_is_a_failure(registry: PluginRegistry) -> None:
    class Silent(Plugin):
        name, exactness, stage = "silent", "identical", -1

        @hookimpl
        def match_prefix(self, seq: Any) -> Any:
            return None

    class Answers(Plugin):
        name, exactness = "answers", "identical"

        @hookimpl
        def match_prefix(self, seq: Any) -> Any:
            return seq

    for plugin in (Silent, Answers):
        registry.add(plugin)
    plan = Planner(registry).resolve({"silent": {}, "answers": {}})
    answer, charged, _ = call_hook(plan, "match_prefix", seq=7, lane=None)
    assert (answer.value, answer.plugin.name) == (7, "answers") and charged == ["silent", "answers"]

    def refuse(plugin: Plugin, result: Any) -> Any:
        raise TypeError(f"{plugin.name} gave {result}")

    answer, charged, (failure,) = call_hook(plan, "match_prefix", refuse, seq=7, lane=None)
    assert answer is None and charged == ["silent", "answers"], "None is no result to check"
    assert str(failure) == "answers.match_prefix: TypeError: answers gave 7"


def test_a_named_error_while_loading_is_raised_as_it_is(planner: Planner) -> None:
    with pytest.raises(BadOption, match="^group_size must divide in_features$"):
        call_hook(planner.resolve({"packed": {}}), "build_linear", part=None, context=None)


# ---- options that name files


class Reads(Plugin):
    """Serves the content of a file."""

    name, exactness = "reads", "steering"
    closed: ClassVar[list[str]] = []

    class Options(PluginOptions):
        path: str = ""

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self.text = Path(self.options.path).read_text()

    @classmethod
    def key_of(cls, options: Any) -> str:
        return super().key_of(options) + file_hash(Path(options.path))

    def refusal(self, context: BuildContext) -> str | None:
        return "the file is empty" if not self.text else None

    def close(self) -> None:
        self.closed.append(self.text)

    @hookimpl
    def build_op(self, kind: str) -> None:
        return None


def test_a_key_holds_the_content_of_files(tmp_path: Path) -> None:
    registry, path = PluginRegistry(), tmp_path / "file"
    registry.add(Reads)
    planner, settings = Planner(registry), {"reads": {"path": str(path)}}
    path.write_text("one")
    first = planner.resolve(settings)
    assert planner.resolve(settings) is first
    path.write_text("two")
    second = planner.resolve(settings)
    assert (first.plugins[0].text, second.plugins[0].text) == ("one", "two")  # type: ignore[attr-defined]
    assert first.lane_key != second.lane_key and first.kv_key != second.kv_key
    assert first.plugins[0].key in first.kv_key, "the key of an instance stays"
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        planner.resolve(settings)


def test_an_instance_may_refuse_a_model(tmp_path: Path) -> None:
    registry, path = PluginRegistry(), tmp_path / "file"
    registry.add(Reads)
    context: Any = object()
    planner, settings = Planner(registry, context), {"reads": {"path": str(path)}}
    path.write_text("")
    Reads.closed.clear()
    for number in (1, 2):
        with pytest.raises(BadOption, match="reads cannot serve this model: the file is empty; change its options"):
            planner.resolve(settings)
        assert len(Reads.closed) == number, "a refused instance is closed and not kept"
    path.write_text("full")
    assert planner.resolve(settings).names == ["reads"]
    path.write_text("")
    assert Planner(registry).resolve(settings).names == ["reads"], "without a model, nothing is refused"


def test_settings_may_use_a_former_name(caplog: pytest.LogCaptureFixture) -> None:
    registry = PluginRegistry.load()
    planner = Planner(registry)
    assert planner.resolve({"paged_attention": {}}) is planner.resolve({"flash_attention": {}})
    assert "plugin paged_attention is now called flash_attention" in caplog.text
    with pytest.raises(PlanConflict, match="named twice"):
        planner.resolve({"paged_attention": {}, "flash_attention": {}})
