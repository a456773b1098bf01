"""The face: its two lists of names agree, every name can be imported, and a type checker knows the type of each."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pitlane

ROOT = Path(__file__).resolve().parents[2]
MYPY = """
[mypy]
strict = true
follow_imports = skip
[mypy-pitlane.*,pluggy.*]
follow_imports = silent
"""


def typed_names() -> dict[str, list[str]]:
    """Names by module that the face imports for type checkers, as `name as name`."""
    tree = ast.parse((ROOT / "api" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    names: dict[str, list[str]] = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom) and statement.module not in names, ast.unparse(statement)
        assert all(alias.name == alias.asname for alias in statement.names), ast.unparse(statement)
        names[str(statement.module)] = [alias.name for alias in statement.names]
    return names


def test_names_for_type_checkers_and_at_run_time_are_the_same() -> None:
    typed = typed_names()
    assert typed == {module: names.split() for module, names in pitlane._NAMES.items()}
    assert list(typed) == sorted(typed) and all(names == sorted(names) for names in typed.values())
    assert pitlane.__all__ == dir(pitlane) == sorted(name for names in typed.values() for name in names)
    assert len(set(pitlane.__all__)) == len(pitlane.__all__)


@pytest.mark.parametrize("name", pitlane.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    assert getattr(pitlane, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pitlane' has no attribute 'Engin'"):
        pitlane.Engin  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_of_the_face_is_major_and_minor() -> None:
    assert re.fullmatch(r"[1-9]\d*\.\d+", pitlane.api_version)


def test_importing_the_face_takes_less_than_50_ms_and_no_large_library() -> None:
    """CPU time of the import, so that other processes of the machine do not count. Best of five."""
    code = (
        "import sys, time; started = time.process_time(); import pitlane; print(time.process_time() - started, "
        "*({'torch', 'numpy', 'transformers', 'pydantic', 'pluggy', 'importlib.metadata'} & set(sys.modules)))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(5)
    ]
    assert all(len(output) == 1 for output in outputs), outputs[0]
    assert min(float(seconds) for (seconds,) in outputs) < 0.05


@pytest.mark.slow
def test_a_type_checker_knows_every_name(tmp_path: Path) -> None:
    """mypy without the libraries that Pitlane imports: 3 s instead of a minute."""
    package = tmp_path / "pitlane"
    package.mkdir()
    for source in [*(ROOT / "api").glob("*.py*"), ROOT / "engine", ROOT / "storage"]:
        (package / source.name).symlink_to(source)
    classes = [name for name in pitlane.__all__ if name[0].isupper() and not name.isupper()]
    lines = [f"reveal_type(pitlane.{name})" for name in pitlane.__all__]
    lines += [f"a_{name}: pitlane.{name}" for name in classes]
    lines += ["pitlane.Engin"]
    (tmp_path / "user.py").write_text("\n".join(["import pitlane", *lines]))
    (tmp_path / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "user.py"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    revealed = [line.partition(" is ")[2] for line in output.splitlines() if "Revealed type is" in line]
    assert len(revealed) == len(pitlane.__all__), output
    assert not [name for name, kind in zip(pitlane.__all__, revealed, strict=True) if kind == '"Any"']
    errors = [line for line in output.splitlines() if ": error: " in line]
    assert errors == [f'user.py:{len(lines) + 1}: error: Module has no attribute "Engin"  [attr-defined]']


@pytest.mark.parametrize(
    "given, expected", [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_of_torch_wait_shortly_unless_the_user_says_otherwise(
    given: dict[str, str], expected: str | None
) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    code = "import pitlane, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment | given, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(expected)
