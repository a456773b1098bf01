"""A plugin of the former face is refused, or fails, with a line that says what replaces its hook, argument, name or attribute."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pitlane
from pitlane import ModelError, Plugin, PluginFailed, SamplingParams, hookimpl
from pitlane.engine.models.registry import resolve
from pitlane.engine.plan.changes import CHANGES
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.ui.cli import main

HEADINGS = (Path(__file__).resolve().parents[3] / "docs" / "hooks.md").read_text(encoding="utf-8").splitlines()
HEAD = (
    "from pitlane import Copy, Plugin, hookimpl\n\nclass Former(Plugin):\n    name, exactness = 'former', 'identical'\n"
)
LINEAR = HEAD.replace("'identical'", "'identical'\n    role = 'linear'")
FORMER = {  # file -> the part of the message that names what the plugin has, and the entry of the table
    HEAD + "    @hookimpl\n    def engine_closed(self): ...": (
        "former has an unknown hook 'engine_closed'",
        "engine_closed",
    ),
    LINEAR + "    @hookimpl\n    def build_linear(self, parts, context): ...": (
        "former.build_linear has an unknown argument 'parts'",
        "build_linear(parts)",
    ),
    HEAD + "    @hookimpl\n    def match_prefix(self, seq, pool): ...": (
        "former.match_prefix has an unknown argument 'pool'",
        "match_prefix(pool)",
    ),
    HEAD + "    @hookimpl\n    def reclaim_blocks(self, pool, num_blocks): ...": (
        "former.reclaim_blocks has an unknown argument 'pool'",
        "reclaim_blocks(pool)",
    ),
    "from pitlane import SpanAttention\n" + HEAD: ("pitlane has no name 'SpanAttention'", "pitlane.SpanAttention"),
    "from pitlane import Query\n" + HEAD: ("pitlane has no name 'Query'", "pitlane.Query"),
    "from pitlane import ModelConfig\n" + HEAD: ("pitlane has no name 'ModelConfig'", "pitlane.ModelConfig"),
    "from pitlane import shapes_of\n" + HEAD: ("pitlane has no name 'shapes_of'", "pitlane.shapes_of"),
}


def message(has: str, former: str) -> str:
    now, heading = CHANGES[former]
    return f"{has}; it is now {now}: read '{heading}' in docs/hooks.md"


@pytest.mark.parametrize("former", CHANGES)
def test_the_heading_exists(former: str) -> None:
    heading = CHANGES[former].heading
    assert {f"# {heading}", f"## {heading}", f"### `{heading}`"} & set(HEADINGS)


@pytest.mark.parametrize("text", FORMER, ids=[former for _, former in FORMER.values()])
def test_a_former_plugin_does_not_load(text: str, tmp_path: Path) -> None:
    (tmp_path / "former.py").write_text(text)
    expected = message(*FORMER[text])
    info = CliRunner().invoke(main, ["plugins", "info", "former", "--plugins-dir", str(tmp_path)])
    error, source = info.stdout.splitlines()
    assert error in (f"former failed: ValueError: {expected}", f"former failed: ImportError: {expected}")
    assert source == f"  source: {tmp_path / 'former.py'}"
    run = CliRunner().invoke(main, ["run", "--plugins", "former", "--plugins-dir", str(tmp_path), "Hello"])
    assert run.exit_code == 2 and expected in run.stderr.splitlines()[-1]


def test_a_former_name_is_an_import_error_and_an_unknown_name_is_not() -> None:
    with pytest.raises(ImportError, match="SpanAttention'; it is now PlainAttention"):
        from pitlane import SpanAttention  # type: ignore[attr-defined]  # noqa: F401
    assert "SpanAttention" not in dir(pitlane) and not hasattr(pitlane, "Nothing")


# ---- plugins that load, and fail later


class FormerLinear(Plugin):
    """Returns a linear, as the former `build_linear` did."""

    name, role, exactness = "former_linear", "linear", "identical"

    @hookimpl
    def build_linear(self, part: Any) -> Any:
        return lambda x: x


class ReadsTensors(Plugin):
    """Reads tensors from a part."""

    name, role, exactness = "reads_tensors", "linear", "identical"

    @hookimpl
    def build_linear(self, part: Any) -> Any:
        return part.tensors["weight"]


class FormerAttention(Plugin):
    """Returns an attention with the former method `plan`."""

    name, role, exactness = "former_attention", "attention", "identical"

    class Attention:
        def plan(self, pool: Any, group: Any, kvs: Any, queries: Any, dtype: Any) -> None: ...

        def __call__(self, q: Any, k: Any, v: Any, store: Any, layer: Any, batch: Any, group: Any) -> Any: ...

    @hookimpl
    def build_attention(self) -> Any:
        return self.Attention()


class NoAttention(Plugin):
    name, role, exactness = "no_attention", "attention", "identical"

    @hookimpl
    def build_attention(self) -> Any:
        return 3


class NoOperation(Plugin):
    name, exactness = "no_operation", "identical"

    @hookimpl
    def build_op(self, kind: str) -> Any:
        return 3


class NoLinear(Plugin):
    """Its plan builds a number."""

    name, role, exactness = "no_linear", "linear", "identical"

    @hookimpl
    def build_linear(self, part: Any) -> Any:
        return pitlane.LinearPlan(0, 0, lambda tensors: 3)


REFUSED: dict[type[Plugin], str] = {
    FormerLinear: message(
        "former_linear.build_linear: TypeError: returned function, must return a LinearPlan or None",
        "build_linear(parts)",
    ),
    ReadsTensors: message("'LinearPart' object has no attribute 'tensors'", "LinearPart.tensors"),
    FormerAttention: message(
        "former_attention.build_attention: TypeError: returned Attention, which has no methods prepare and __call__",
        "Attention.plan",
    ),
    NoAttention: "no_attention.build_attention: TypeError: returned int, which has no methods prepare and __call__; take",
    NoOperation: "no_operation.build_op: TypeError: returned 3, which is not callable; take no_operation out",
    NoLinear: "no_linear.build_linear: TypeError: build returned 3, which is not callable; take no_linear out",
}


@pytest.mark.parametrize("plugin", REFUSED, ids=lambda plugin: plugin.name)
def test_a_part_of_the_former_kind_is_refused_when_it_is_built(make_engine: Any, plugin: type[Plugin]) -> None:
    registry = PluginRegistry()
    registry.add(plugin)
    with pytest.raises(PluginFailed) as caught:
        make_engine(registry=registry, plugins=[plugin.name])
    assert REFUSED[plugin] in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "call, former",
    [
        (lambda seq, lane: seq.kv.operations.append(None), "KVState.operations"),
        (lambda seq, lane: lane.runner.execute([]), "Runner.execute"),
        (lambda seq, lane: lane.builder.build([]).queries, "Batch.queries"),
        (lambda seq, lane: lane.builder.build([]).reads, "Batch.reads"),
    ],
    ids=["KVState.operations", "Runner.execute", "Batch.queries", "Batch.reads"],
)
def test_a_former_attribute_is_explained(make_engine: Any, call: Callable[[Any, Any], Any], former: str) -> None:
    class Reaches(Plugin):
        name, exactness = "reaches", "identical"

        @hookimpl
        def block_sealed(self, seq: Any, lane: Any) -> None:
            call(seq, lane)

    registry = PluginRegistry()
    registry.add(Reaches)
    engine = make_engine(registry=registry, plugins=["reaches"])
    failed = engine.generate(list(range(40)), SamplingParams(max_tokens=2, ignore_eos=True)).stats["failed"]
    owner, _, name = former.partition(".")
    assert failed["reaches"].endswith(message(f"{owner!r} object has no attribute {name!r}", former))


# ---- a renamed argument: the former name runs until the next major version


class Former(Plugin):
    """Written when `load_model` had the argument `source`."""

    name, exactness = "former", "identical"

    @hookimpl
    def load_model(self, source: str) -> Any:
        raise ModelError(f"asked for {source}")


class Current(Plugin):
    name, exactness = "current", "identical"

    @hookimpl
    def load_model(self, name: str) -> Any:
        raise ModelError(f"asked for {name}")


def test_a_plugin_with_the_former_name_of_an_argument_runs_with_a_warning() -> None:
    registry = PluginRegistry()
    with pytest.warns(
        DeprecationWarning, match=r"load_model\(source\) is now load_model\(name\).*version 2.0"
    ) as warned:
        registry.add(Former)
    assert len(warned) == 1 and warned[0].filename == __file__, "the warning points at the plugin"
    assert registry.entries["former"].status == "ok"
    with pytest.raises(ModelError, match="asked for somewhere/else"):
        resolve("somewhere/else", registry)


def test_the_name_of_now_gives_no_warning() -> None:
    registry = PluginRegistry()
    registry.add(Current)  # warnings are errors in this project's tests
    with pytest.raises(ModelError, match="asked for somewhere/else"):
        resolve("somewhere/else", registry)


def test_a_plugin_with_a_former_name_loads_from_a_file(tmp_path: Path) -> None:
    """In a process without pytest's filters: the plugin is ok, and Python shows the warning to developers."""
    text = "from pitlane import Plugin, hookimpl\nclass Old(Plugin):\n    name, exactness = 'old', 'identical'\n"
    (tmp_path / "old.py").write_text(text + "    @hookimpl\n    def load_model(self, source): return None\n")
    code = f"from pitlane import PluginRegistry; print(PluginRegistry.load({str(tmp_path)!r}).entries['old'].status)"
    command = [sys.executable, "-W", "default::DeprecationWarning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == "ok\n" and "load_model(source) is now load_model(name)" in result.stderr
