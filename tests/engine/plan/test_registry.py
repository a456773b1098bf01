"""Finding plugins: files, packages, built-ins; whatever is broken is isolated and says why."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pitlane import (
    BadOption,
    Plugin,
    PluginOptions,
    UnknownPlugin,
    disable_plugin,
    enable_plugin,
    find_plugins,
    hookimpl,
)
from pitlane.engine.plan.registry import BUILT_IN, PluginRegistry, hooks_of, validate
from pitlane.engine.plan.validation import Incompatible

GOOD = """
from pitlane import Plugin, hookimpl

class {cls}(Plugin):
    name, exactness = "{name}", "identical"

    @hookimpl
    def step_finished(self, stats):
        pass
"""


def good(name: str) -> str:
    return GOOD.format(cls=name.title(), name=name)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., PluginRegistry]:
    """The registry with files of that content beside the built-ins."""

    def load(**files: str) -> PluginRegistry:
        folder = tmp_path / "plugins"
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(text))
        return PluginRegistry.load(folder)

    return load


def failed(registry: PluginRegistry) -> dict[str, str]:
    return {entry.name: entry.reason for entry in registry if entry.status == "failed"}


# ---- files


def test_built_ins_load_alone() -> None:
    registry = PluginRegistry.load()
    assert failed(registry) == {}
    assert sorted(entry.name for entry in registry) == sorted(module.rpartition(".")[2] for module in BUILT_IN)
    assert {entry.source for entry in registry} == {"built-in"}


def test_a_file_is_found_with_its_source(load: Callable[..., PluginRegistry]) -> None:
    registry = load(mine=good("mine"))
    entry = registry.entries["mine"]
    assert (entry.status, entry.hooks, Path(entry.source).name) == ("ok", ["step_finished"], "mine.py")
    assert "mine" in registry.togglable() and registry.get("mine").name == "mine"


def test_several_classes_of_one_file_and_none_that_it_only_imports(load: Callable[..., PluginRegistry]) -> None:
    extra = "from pitlane.plugins.prompt_lookup import PromptLookup\n"
    registry = load(pair=extra + good("first") + good("second"))
    assert failed(registry) == {} and {"first", "second"} <= set(registry.entries)


def test_the_folder_may_come_from_the_environment(
    load: Callable[..., PluginRegistry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(mine=good("mine"))
    monkeypatch.setenv("PITLANE_PLUGINS_DIR", str(tmp_path / "plugins"))
    assert "mine" in PluginRegistry.load().entries


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="plugins folder .*absent is not a folder"):
        PluginRegistry.load(tmp_path / "absent")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("def broken(:", "SyntaxError"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("raise RuntimeError('at import')", "RuntimeError: at import"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = 1", "TypeError: it holds no Plugin class"),
    ],
)
def test_a_file_that_does_not_import_is_isolated(
    load: Callable[..., PluginRegistry], caplog: pytest.LogCaptureFixture, text: str, reason: str
) -> None:
    with caplog.at_level(logging.WARNING, "pitlane"):
        registry = load(aaa_before=good("before"), broken=text, zzz_after=good("after"))
    assert list(failed(registry)) == ["broken"] and failed(registry)["broken"].startswith(reason)
    assert reason in caplog.text and "broken" in caplog.text
    assert {"before", "after", "prompt_lookup"} <= set(registry.togglable())
    assert "broken" not in registry.togglable()
    with pytest.raises(UnknownPlugin, match=r"plugin 'broken' \(.*broken.py\) did not load: "):
        registry.get("broken")


@pytest.mark.parametrize(
    "body, reason",
    [
        (
            "name, exactness = 'odd', 'identical'\n    @hookimpl\n    def prepose(self): pass",
            "odd has an unknown hook 'prepose'; the hooks are: load_document, .*propose, .*sequence_finished",
        ),
        (
            "name, exactness = 'odd', 'identical'\n    @hookimpl\n    def propose(self, seqs, limitz): pass",
            "odd.propose has an unknown argument 'limitz'; its arguments are: seqs, limits",
        ),
        (
            "name, exactness = 'odd', 'identical'\n    def step_finished(self, stats): pass",
            "odd.step_finished has the name of a hook; write @hookimpl above it",
        ),
        ("name, exactness, role = 'odd', 'identical', 'driver'", "odd.role must be None or one of drafter, .*'driver'"),
        (
            "name, exactness = 'odd', 'exact'",
            "odd.exactness must be one of identical, rounding, approximate, steering, got 'exact'",
        ),
        ("name = 'odd'", "odd.exactness must be one of"),
        ("exactness = 'identical'", "Odd.name must be an identifier, got None"),
        ("name, exactness = 'od d', 'identical'", "Odd.name must be an identifier, got 'od d'; write name = \"od_d\""),
        ("name, exactness, requires = 'odd', 'identical', 'other'", "odd.requires must be a tuple of names"),
        ("name, exactness, conflicts = 'odd', 'identical', 'other'", "odd.conflicts must be a tuple of names"),
        (
            "name, exactness = 'odd', 'identical'\n    class Options(PluginOptions):\n        must: int",
            "BadOption: odd.must = .*required",
        ),
    ],
)
def test_a_class_that_is_no_plugin_is_refused_with_the_reason(
    load: Callable[..., PluginRegistry], body: str, reason: str
) -> None:
    registry = load(odd_one=f"from pitlane import Plugin, PluginOptions, hookimpl\nclass Odd(Plugin):\n    {body}\n")
    assert list(failed(registry)) == ["odd_one"]
    with pytest.raises(UnknownPlugin, match=f"(?s){reason}"):
        registry.get("odd_one")


def test_an_unknown_name_shows_what_did_not_load(load: Callable[..., PluginRegistry]) -> None:
    registry = load(odd_one="from pitlane import Plugin\nclass Odd(Plugin):\n    name = 'odd'\n")
    with pytest.raises(
        UnknownPlugin, match=r"unknown plugin 'odd'; known: .*; not loaded: odd_one \(.*odd.exactness must"
    ):
        registry.get("odd")


def test_a_class_that_is_broken_does_not_take_its_neighbour_along(load: Callable[..., PluginRegistry]) -> None:
    registry = load(pair=good("fine") + "\nclass Odd(Plugin):\n    name = 'odd'\n")
    assert registry.entries["fine"].status == "ok"
    assert "odd.exactness" in failed(registry)["pair"]


def test_a_name_that_is_taken_stays_with_its_holder_and_the_other_is_told(load: Callable[..., PluginRegistry]) -> None:
    registry = load(prompt_lookup=good("prompt_lookup"), renamed=good("prefix_cache"))
    assert registry.get("prompt_lookup").__module__ == "pitlane.plugins.prompt_lookup"
    assert registry.get("prefix_cache").__module__ == "pitlane.plugins.prefix_cache"
    assert failed(registry) == {
        "prompt_lookup": "ValueError: plugin name 'prompt_lookup' is taken by built-in",
        "renamed": "ValueError: plugin name 'prefix_cache' is taken by built-in",
    }


def test_iteration_is_by_name(load: Callable[..., PluginRegistry]) -> None:
    names = [entry.name for entry in load(zz=good("zz"), aa=good("aa"), broken="1/0")]
    assert names == sorted(names) and {"aa", "broken", "zz"} < set(names)


# ---- packages


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A distribution as pip would leave it, on sys.path."""

    def install(name: str, version: str, target: str, **modules: str) -> None:
        folder = tmp_path / f"site-{name}"
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[pitlane]\nentry_of_{name.replace('-', '_')} = {target}\n")
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])

    return install


def test_installed_packages_are_found(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install("pitlane-one", "1.2", "pitlane_trial_one:One", pitlane_trial_one=good("one"))
    install("pitlane-two", "0.3", "pitlane_trial_two", pitlane_trial_two=good("two") + good("three"))
    install("pitlane-bad", "9", "pitlane_trial_bad", pitlane_trial_bad="import no_such_module_at_all")
    install("pitlane-none", "9", "pitlane_trial_none:Missing", pitlane_trial_none="Missing = 3")
    monkeypatch.delenv("PITLANE_LOAD")
    registry = PluginRegistry.load()
    sources = {entry.name: entry.source for entry in registry if entry.source != "built-in"}
    assert {name: sources[name] for name in ("one", "two", "three")} == {
        "one": "pitlane-one 1.2",
        "two": "pitlane-two 0.3",
        "three": "pitlane-two 0.3",
    }
    assert failed(registry)["entry_of_pitlane_bad"].startswith("ModuleNotFoundError")
    assert failed(registry)["entry_of_pitlane_none"] == "TypeError: 3 is not a subclass of pitlane.Plugin"


@pytest.mark.parametrize(
    "value, expected",
    [("", set()), ("pitlane-one", {"one"}), (" pitlane-one , pitlane-two", {"one", "two"}), ("pitlane-six", set())],
)
def test_pitlane_load_names_the_packages(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, value: str, expected: set[str]
) -> None:
    install("pitlane-one", "1.2", "pitlane_trial_one:One", pitlane_trial_one=good("one"))
    install("pitlane-two", "0.3", "pitlane_trial_two:Two", pitlane_trial_two=good("two"))
    monkeypatch.setenv("PITLANE_LOAD", value)
    assert {entry.name for entry in PluginRegistry.load() if entry.source != "built-in"} == expected


def test_a_package_that_is_not_named_is_not_imported(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("pitlane-one", "1", "pitlane_trial_one", pitlane_trial_one="raise AssertionError('imported')")
    monkeypatch.setenv("PITLANE_LOAD", "pitlane-two")
    assert failed(PluginRegistry.load()) == {}
    assert "pitlane_trial_one" not in sys.modules


# ---- classes


class Quiet(Plugin):
    """Has no hooks."""

    name, exactness = "quiet", "identical"


class Late(Plugin):
    """Reads documents of one kind; takes one of the arguments only."""

    name, exactness, stage = "a_late", "identical", 5

    @hookimpl
    def load_document(self, path: str) -> Any:
        return f"late {path}"


class Early(Plugin):
    """Is asked first, and declines most."""

    name, exactness, stage = "z_early", "identical", -5

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self._kind = "text/x-early"

    @property
    def kind(self) -> str:  # must not be read of a class that is only looked at
        return self._kind

    @hookimpl
    def load_document(self, path: str, mime: str) -> Any:
        return f"early {path}" if mime == self.kind else None


def test_host_hooks_ask_by_stage_until_one_answers() -> None:
    registry = PluginRegistry()
    assert registry.first("load_document", path="p", mime="text/x-early") is None
    registry.add(Late)
    registry.add(Early)
    assert registry.first("load_document", path="p", mime="text/x-early") == "early p"
    assert registry.first("load_document", path="p", mime="text/plain") == "late p"


def test_what_serves_the_host_is_not_togglable() -> None:
    registry = PluginRegistry()
    for plugin in (Late, Quiet):
        registry.add(plugin)
    assert registry.entries["a_late"].serves_host and not registry.entries["quiet"].serves_host
    assert registry.togglable() == ["quiet"]


def test_a_former_name_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    registry = PluginRegistry()
    registry.add(type("Renamed", (Quiet,), {"former_names": ("loud", "noisy")}))
    with caplog.at_level(logging.WARNING, "pitlane"):
        for name in ("loud", "noisy", "loud"):
            assert registry.get(name).name == "quiet"
    assert [record.getMessage() for record in caplog.records] == [
        f"plugin {name} is now called quiet; use the new name" for name in ("loud", "noisy")
    ]


def test_hooks_are_listed_in_call_order() -> None:
    class Both(Plugin):
        name, exactness = "both", "identical"

        @hookimpl
        def sequence_finished(self, seq: Any) -> None: ...

        @hookimpl
        def propose(self, seqs: Any) -> None: ...

        @hookimpl
        def match_prefix(self, seq: Any) -> None: ...

        def block_sealed(self) -> None: ...  # not marked: a method like any other

    assert hooks_of(Both) == ["match_prefix", "propose", "sequence_finished"]


def test_add_refuses_a_taken_name() -> None:
    registry = PluginRegistry()
    registry.add(Quiet, "here")
    with pytest.raises(ValueError, match="plugin name 'quiet' is taken by here"):
        registry.add(Quiet)


@pytest.mark.parametrize("thing", [3, int, "prefix_cache", Quiet()])
def test_only_classes_of_plugins_are_valid(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"is not a subclass of pitlane\.Plugin"):
        validate(thing)


def test_a_plugin_may_have_the_name_of_a_plugin_that_did_not_load(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("raise RuntimeError('broken')\n")
    registry = PluginRegistry.load(tmp_path)

    class Works(Plugin):
        name, exactness = "a", "identical"

    registry.add(Works)
    assert registry.get("a") is Works
    assert [entry.reason for entry in registry if entry.plugin is None] == ["RuntimeError: broken"]


# ---- versions, dependencies, disabled plugins


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("2.0", "needs version 2.0 of the plugin API, and this Pitlane has 1.0; upgrade pitlane"),
        ("1.9", "needs version 1.9 of the plugin API, and this Pitlane has 1.0; upgrade pitlane"),
        ("0.3", "needs version 0.3 of the plugin API, and this Pitlane has 1.0; install a newer version of it"),
    ],
)
def test_a_plugin_for_another_version_is_incompatible_and_not_imported(
    load: Callable[..., PluginRegistry], version: str, reason: str
) -> None:
    text = "raise RuntimeError('imported')\nclass Other:\n    api_version = '" + version + "'\n"
    registry = load(other=text, fine=good("fine"))
    entry = registry.entries["other"]
    assert entry.status == "incompatible" and reason in entry.reason
    assert registry.entries["fine"].status == "ok"
    with pytest.raises(UnknownPlugin, match="plugin 'other' .* did not load: Incompatible: other needs version"):
        registry.get("other")


@pytest.mark.parametrize(
    "text",
    [
        "client = dict(\n    api_version = '2.0',\n)\n" + good("fine"),
        "def connect(\n    api_version = '2.0',\n): pass\n" + good("fine"),
        "class Client:\n    api_version = '2.0'\n" + good("fine"),
        '"""Usage:\n    api_version = "2.0"\n"""\n' + good("fine"),
    ],
    ids=["call", "default", "other class", "docstring"],
)
def test_only_the_class_of_the_plugin_declares_its_version(load: Callable[..., PluginRegistry], text: str) -> None:
    assert load(fine=text).entries["fine"].status == "ok"


@pytest.mark.parametrize("value", ["pitlane_trial:Two", "pitlane_trial.inner", "pitlane_trial.inner:Three"])
def test_only_the_module_of_the_entry_point_declares_the_version(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    install("pitlane-two", "1", value)
    folder = tmp_path / "site-pitlane-two" / "pitlane_trial"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .inner import Three as Two\n")
    inner = "raise RuntimeError('imported')\nclass Three:\n    name: str = 'three'\n    api_version: str = '2.0'\n"
    (folder / "inner.py").write_text(inner)
    (folder / "aaa.py").write_text("class Other:\n    name = 'other'\n    api_version = '3.0'\n")
    monkeypatch.delenv("PITLANE_LOAD")
    (candidate,) = find_plugins()
    assert (candidate.api_version(), candidate.class_names()) == ("2.0", ["three"])
    assert PluginRegistry.load().entries[candidate.name].status == "incompatible"


@pytest.mark.parametrize(("version", "status"), [("1.0", "ok"), ("2.0", "incompatible"), ("two", "failed")])
def test_the_version_of_a_class_counts(version: str, status: str) -> None:
    plugin = type("Versioned", (Plugin,), {"name": "versioned", "exactness": "identical", "api_version": version})
    if status == "ok":
        validate(plugin)
        return
    with pytest.raises(Incompatible if status == "incompatible" else ValueError, match=f"versioned.*{version}"):
        validate(plugin)


def test_a_missing_dependency_comes_with_its_install_command(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("pitlane-needy", "1", "pitlane_needy", pitlane_needy="import no_such_lib.part")
    install("pitlane-extra", "1", "pitlane_extra", pitlane_extra="import other_lib")
    install("pitlane-own", "1", "pitlane_own", pitlane_own="import pitlane_own.part")
    needs = {"needy": "no-such-lib>=2", "extra": 'other_lib; extra == "fast"', "own": "pitlane"}
    for name, requirement in needs.items():
        path = tmp_path / f"site-pitlane-{name}" / f"pitlane_{name}-1.dist-info" / "METADATA"
        path.write_text(path.read_text() + f"Requires-Dist: {requirement}\n")
    monkeypatch.delenv("PITLANE_LOAD")
    reasons = {entry.source: entry.reason for entry in PluginRegistry.load() if entry.status == "failed"}
    assert reasons["pitlane-needy 1"].endswith(
        "No module named 'no_such_lib'; install it: pip install 'no-such-lib>=2'"
    )
    assert reasons["pitlane-extra 1"].endswith("install it: pip install 'pitlane-extra[fast]'")
    assert "install it" not in reasons["pitlane-own 1"], "a module of the package itself"


def test_a_disabled_plugin_is_not_imported(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of its entry point, and by the name of its package; the others load."""
    install("pitlane-one", "1", "pitlane_trial_one", pitlane_trial_one="raise AssertionError('imported')")
    install("pitlane-two", "1", "pitlane_trial_two", pitlane_trial_two=good("two"))
    monkeypatch.delenv("PITLANE_LOAD")
    for name in ("pitlane-one", "entry_of_pitlane_one"):
        disable_plugin(name)
        disable_plugin(name)
        registry = PluginRegistry.load()
        entry = registry.entries["entry_of_pitlane_one"]
        assert (entry.status, entry.plugin) == ("disabled", None)
        assert entry.reason == f"disabled; to load it again: pitlane plugins enable {name}"
        assert "pitlane_trial_one" not in sys.modules and registry.entries["two"].status == "ok"
        assert enable_plugin(name) and not enable_plugin(name)
    assert PluginRegistry.load().entries["entry_of_pitlane_one"].status == "failed"


def test_a_class_is_disabled_by_its_name(
    load: Callable[..., PluginRegistry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plugins"
    assert load(pair=good("first") + good("second")).entries["first"].status == "ok"
    disable_plugin("first", folder)
    entries = PluginRegistry.load(folder).entries
    assert (entries["first"].status, entries["second"].status) == ("disabled", "ok")
    assert entries["first"].reason == "disabled; to load it again: pitlane plugins enable first"
    disable_plugin("second", folder)
    assert PluginRegistry.load(folder).entries["pair"].status == "disabled", "not imported"
    assert enable_plugin("first") and enable_plugin("second")


def test_only_a_plugin_that_is_here_and_not_built_in_can_be_disabled(load: Callable[..., PluginRegistry]) -> None:
    with pytest.raises(BadOption, match="plugin prefix_cache is built-in and cannot be disabled; leave it out"):
        disable_plugin("prefix_cache")
    with pytest.raises(UnknownPlugin, match="no package or file has a plugin 'prefix_cash'; known: none; give"):
        disable_plugin("prefix_cash")


def test_finding_plugins_imports_none_and_tells_of_changes(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("pitlane-one", "1.2", "pitlane_trial_one:One", pitlane_trial_one=good("one"))
    monkeypatch.delenv("PITLANE_LOAD")
    (candidate,) = find_plugins()
    assert (candidate.name, candidate.source, candidate.module) == (
        "entry_of_pitlane_one",
        "pitlane-one 1.2",
        "pitlane_trial_one",
    )
    state = candidate.state()
    assert "pitlane_trial_one" not in sys.modules and candidate.state() == state
    (tmp_path / "site-pitlane-one" / "pitlane_trial_one.py").write_text(good("one") + "# changed\n")
    assert candidate.state() != state
