"""Plugin settings from text: lists, changes, options, replaced plugins, and refusals that name the value."""

from __future__ import annotations

from typing import Any

import pytest

from pitlane import (
    BadOption,
    Draft,
    PitlaneError,
    PlanConflict,
    Planner,
    Plugin,
    PluginOptions,
    PluginRegistry,
    UnknownPlugin,
    hookimpl,
)
from pitlane.ui.plugin_text import parse_settings


class Chain(Plugin):
    """Drafts chains."""

    name, role, exactness = "chain", "drafter", "identical"

    class Options(PluginOptions):
        length: int = 4

    @hookimpl
    def propose(self, seqs: Any, limits: Any) -> list[Draft | None]:
        return [None for _ in seqs]


class Tree(Chain):
    """Drafts trees."""

    name = "tree"


class Packed(Plugin):
    """Builds linears."""

    name, role, exactness = "packed", "linear", "approximate"

    class Options(PluginOptions):
        bits: int = 8

    @hookimpl
    def build_linear(self, part: Any, context: Any) -> None:
        return None


class Costly(Plugin):
    """Has no role."""

    name, exactness = "costly", "identical"


@pytest.fixture
def registry() -> PluginRegistry:
    registry = PluginRegistry()
    for plugin in (Chain, Tree, Packed, Costly):
        registry.add(plugin)
    return registry


DEFAULT = {"tree": {}, "packed": {"bits": 4}}


@pytest.mark.parametrize(
    "text, options, expected",
    [
        (None, [], {"tree": {}, "packed": {"bits": 4}}),
        ("", [], {}),
        (" , ", [], {}),
        ("chain", [], {"chain": {}}),
        (" chain , packed ", [], {"chain": {}, "packed": {}}),
        ("-tree", [], {"packed": {"bits": 4}}),
        ("-costly", [], {"tree": {}, "packed": {"bits": 4}}),
        ("+costly", [], {"tree": {}, "packed": {"bits": 4}, "costly": {}}),
        ("+chain", [], {"packed": {"bits": 4}, "chain": {}}),
        ("+chain,-packed", [], {"chain": {}}),
        ("+packed", [], {"tree": {}, "packed": {"bits": 4}}),
        ("+chain", ["chain.length=9"], {"packed": {"bits": 4}, "chain": {"length": "9"}}),
        (None, ["packed.bits=16"], {"tree": {}, "packed": {"bits": "16"}}),
        ("chain", ["chain.share=0.1", "chain.eager=a=b"], {"chain": {"share": "0.1", "eager": "a=b"}}),
    ],
)
def test_settings_from_text(
    registry: PluginRegistry, text: str | None, options: list[str], expected: dict[str, Any]
) -> None:
    assert parse_settings(text, options, DEFAULT, registry).settings == expected
    assert DEFAULT == {"tree": {}, "packed": {"bits": 4}}, "the default is not changed"


@pytest.mark.parametrize(
    "text, options, error, message",
    [
        ("chain,+tree", [], BadOption, r"'chain,\+tree' mixes names with \+name and -name"),
        ("-chain,+chain", [], BadOption, r"'-chain,\+chain' both adds and removes chain"),
        ("nothing", [], UnknownPlugin, "unknown plugin 'nothing'; known:"),
        ("+nothing", [], UnknownPlugin, "unknown plugin 'nothing'; known:"),
        ("-nothing", [], UnknownPlugin, "unknown plugin 'nothing'; known:"),
        (None, ["packed.bits"], BadOption, "option 'packed.bits' is not of the form plugin.key=value"),
        (None, ["bits=4"], BadOption, "option 'bits=4' is not of the form plugin.key=value"),
        (None, [".bits=4"], BadOption, "is not of the form"),
        (None, ["chain.length=4"], BadOption, r"plugin chain is not in the plan \(tree, packed\)"),
        ("", ["chain.length=4"], BadOption, r"plugin chain is not in the plan \(empty\)"),
    ],
)
def test_bad_settings_are_named(
    registry: PluginRegistry, text: str | None, options: list[str], error: type[PitlaneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse_settings(text, options, DEFAULT, registry)


@pytest.mark.parametrize("text", ["+chain,+tree", "chain,tree", "-packed,+chain,+tree"])
def test_a_text_that_names_two_plugins_of_a_role_is_refused(registry: PluginRegistry, text: str) -> None:
    with pytest.raises(PlanConflict, match="drafter is held by chain; take it out to enable tree"):
        parse_settings(text, [], DEFAULT, registry)


@pytest.mark.parametrize(
    "text, replaced",
    [
        ("+chain", ["chain replaces tree; a plan has one drafter"]),
        ("+chain,-tree", []),
        ("+tree", []),
        ("+costly", []),
        ("chain", []),
        ("", []),
    ],
)
def test_an_added_plugin_says_which_plugin_it_replaces(
    registry: PluginRegistry, text: str, replaced: list[str]
) -> None:
    assert [str(replacement) for replacement in parse_settings(text, [], DEFAULT, registry).replaced] == replaced


def test_a_plugin_that_was_added_before_is_replaced_too(registry: PluginRegistry) -> None:
    settings = parse_settings("+chain", [], {}, registry).settings
    settings, replaced = parse_settings("+tree", [], settings, registry)
    assert Planner(registry).resolve(settings).names == ["tree"] and replaced[0].old == "chain"
