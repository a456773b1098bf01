"""The guide docs/writing-plugins.md: its files are written, its tests and commands run, its outputs compared.

The slow tier follows it to the letter. There, the commands run in a virtual environment of their own, which sees the packages of
this environment. `pip install -e .` installs into it, without a network.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import pitlane
from pitlane import Plugin, SamplingParams, hookimpl
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.ui.cli import main

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "writing-plugins.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
OFFLINE = {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1", "PIP_QUIET": "1"}
SCRIPT = "import runpy\nrunpy.run_module({!r}, run_name='__main__')\n"
SCRIPTS = {"pitlane": "from pitlane.ui.cli import main\nmain()\n"}


@dataclass
class Reader:
    """Follows the guide in a folder, as a shell with `bin` first in PATH."""

    folder: Path
    bin: Path
    packages: str  # names of the plugin packages to load
    outputs: list[tuple[str, str]] = field(default_factory=list)  # shown in the guide, and real

    @classmethod
    def settle(cls, folder: Path, packages: str) -> Reader:
        """Make a virtual environment that sees the packages of this environment, with pip, pytest and pitlane in its PATH."""
        venv.create(folder / "venv", symlinks=True)
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
        (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        binaries = folder / "venv" / "bin"
        for name in ("pip", "pytest", "pitlane"):
            (binaries / name).write_text(f"#!{binaries / 'python'}\n{SCRIPTS.get(name, SCRIPT.format(name))}")
            (binaries / name).chmod(0o755)
        return cls(folder, binaries, packages)

    def follow(self, blocks: list[tuple[str, str, str]]) -> None:
        """Write the files, run the commands, keep the outputs."""
        here, output = self.folder, ""
        state = self.folder / "state.sh"
        state.write_text(f"cd {self.folder}\n")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PITLANE_")}
        environment |= OFFLINE | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "PITLANE_LOAD": self.packages}
        environment |= {"PITLANE_HOME": str(self.folder / "home"), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # half a second per run
        for language, name, text in blocks:
            if language == "text":
                self.outputs.append((text, output))
            elif name:
                (here / name).parent.mkdir(exist_ok=True)
                (here / name).write_text(text, encoding="utf-8")
            else:
                assert language == "sh", f"a block of {language} names no file"
                script = f". {state}\nset -eu\n{text}\n{{ export -p; echo cd $PWD; }} > {state}\n"
                run = subprocess.run(
                    ["bash", "-c", script], env=environment, capture_output=True, text=True, check=False
                )
                assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"
                output, here = run.stdout, Path(state.read_text().splitlines()[-1].removeprefix("cd "))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    reader = Reader.settle(tmp_path_factory.mktemp("guide"), "pitlane-echo")
    reader.follow(BLOCKS)
    return reader


def comparable(output: str) -> list[str]:
    """The lines without spaces and rules of tables, the time of tests, and the number of draft tokens."""
    text = re.sub(r"passed in [\d.]+s|\d+ draft tokens", "number", output)
    return [line for line in (" ".join(line.replace("─", "").split()) for line in text.splitlines()) if line]


@pytest.mark.slow
def test_the_commands_print_what_the_guide_shows(reader: Reader) -> None:
    assert len(reader.outputs) == GUIDE.count("```text\n") == 5
    for shown, real in reader.outputs:
        assert comparable(real) == comparable(shown)


def test_the_files_of_the_guide_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last version of each file, its tests in one process, and two of the commands; no shell, nothing is installed."""
    for _, name, text in BLOCKS:
        if name:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PITLANE_PLUGINS_DIR", ".")
    shown = {before[2].strip(): block[2] for before, block in pairwise(BLOCKS) if block[0] == "text"}
    result = CliRunner().invoke(main, ["plugins", "info", "echo"])
    described = [
        line for line in comparable(shown["pitlane plugins info echo"]) if not line.startswith("note: not checked")
    ]
    assert result.exit_code == 0 and comparable(result.stdout) == described, result.output
    result = CliRunner().invoke(main, ["plugins", "check", "echo", "-o", "echo.match=1", "--tokens", "24"])
    assert result.exit_code == 0 and result.stdout.startswith("echo declares identical: proved"), result.output
    monkeypatch.delenv("PITLANE_PLUGINS_DIR")  # as the guide does before the tests
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    run = subprocess.run([sys.executable, "-m", "pytest", "-q"], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "6 passed" in run.stdout, run.stdout


def _a_linear(config: Any) -> Any:
    return next(part for part in pitlane.parts_of(config) if isinstance(part, pitlane.LinearPart))


@pytest.fixture(scope="module")
def watched() -> dict[str, Any]:
    """The objects that hooks get, by the name in the tables of the guide."""
    objects: dict[str, Any] = {}

    class Watcher(Plugin):
        name, role, exactness = "watcher", "drafter", "identical"

        @hookimpl
        def build_runner(self, forward: Any, context: Any) -> Any:
            return lambda batch: (objects.update(batch=batch), forward(batch))[1]

        @hookimpl
        def build_op(self, kind: str, context: Any) -> None:
            objects.update(context=context, part=_a_linear(context.config), group=context.config.kv_groups[0])

        @hookimpl
        def step_finished(self, stats: Any) -> None:
            objects.update(stats=stats)

        @hookimpl
        def propose(self, seqs: Any, limits: Any) -> Any:
            objects.update(seq=seqs[0], limits=limits, lane=limits.lane)

        @hookimpl
        def adjust_logits(self, rows: Any) -> None:
            objects.update(rows=rows)

    registry = PluginRegistry()
    registry.add(Watcher)
    with pitlane.Engine("random:tiny", plugins={"watcher": {}}, registry=registry) as engine:
        result = engine.generate([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
    assert result.stats["failed"] == {}
    return objects


TABLES = re.findall(r"^\*\*`(\w+)`\*\*.*\n\n\| field .*\n.*\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)
FIELDS = [
    (table, name, row.split(" | ")[1]) for table, rows in TABLES for row in rows.splitlines()
    for name in re.findall(r"`(\S[^`]*)`", row.split(" | ")[0])
]  # fmt: skip


@pytest.mark.parametrize("table, field, kind", FIELDS, ids=lambda value: str(value))
def test_the_fields_of_the_tables_exist(watched: dict[str, Any], table: str, field: str, kind: str) -> None:
    path, value = field.partition("(")[0], watched[table]
    for name in path.replace("groups[g]", "groups.0").split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    if "(" in field:
        arguments = [name.strip() for name in field.partition("(")[2].rstrip(")").split(",")]
        assert len(inspect.signature(value).parameters) >= len(arguments) and callable(value)
    elif value is None:
        assert kind.endswith(" or None")
    elif ("[" in kind and "64" in kind) or "32" in kind:
        assert f"{value.dtype}".removeprefix("torch.") == kind.split()[0] and value.dim() == kind.count(",") + 1
    elif kind.split("[")[0] in ("int", "bool", "str", "float", "list", "tuple", "dict"):
        assert type(value).__name__ == kind.split("[")[0]


def test_the_tables_have_all_objects() -> None:
    names = ["seq", "limits", "rows", "lane", "batch", "context", "part", "group", "stats"]
    assert [table for table, _ in TABLES] == names and len(FIELDS) > 65


def test_attributes_of_a_plugin_are_listed() -> None:
    section = GUIDE.split("## 5.")[1].split("## 6.")[0]
    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)", row)
    }
    own = {name for name in {**Plugin.__annotations__, **vars(Plugin)} if not name.startswith("_")}
    for_built_ins = {"is_default", "is_default_for_documents"}
    assert own - listed == {"Options", *for_built_ins, "parse_options", "summary", "key", "key_of", "close"}


def test_the_names_that_import_torch_are_listed() -> None:
    code = """if True:
        import sys, pitlane
        sys.modules["torch"] = None  # an import of torch fails
        for name in pitlane.__all__:
            try:
                getattr(pitlane, name)
            except ImportError:
                print(name)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imports = GUIDE.split("These names import torch too")[1].split("\n\n")[0].partition("into functions:")[2]
    assert re.findall(r"`(\w+)`", imports) == run.stdout.split()


def test_every_python_block_names_its_file() -> None:
    assert all(name for language, name, _ in BLOCKS if language in ("python", "toml"))
    assert all(f"`{name}`" in GUIDE for _, name, _ in BLOCKS if name), "the text names the file too"
