"""The generated part of docs/hooks.md: signature, combination, users and an example of every hook.

The text between a heading and the mark `BEGIN` is written by hand. The text from there to `END` comes from the declarations of the
hooks, from the plugins, and from docs/hook_examples.py.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pitlane import Plugin, PluginRegistry
from pitlane.engine.plan import hookspecs
from pitlane.engine.plan.hookspecs import SPECS
from pitlane.engine.plan.registry import hooks_of

FOLDER = Path(__file__).resolve().parent
BEGIN, END = "<!-- generated -->", "<!-- end -->"
COMBINE = {
    "first": "the first result that is not `None`",
    "all": "every implementation is called; results are not used",
    "fold": "every implementation gets the result of the implementation before it",
}
KIND = {
    "host": "outside plans",
    "variant": "when weights load; plans that differ here have weights of their own",
    "lane": "when a lane is built; plans that differ here have KV of their own",
    "opening": "before the first request of a plan in a lane",
    "step": "while requests run, on the engine's thread",
}
HEADING = re.compile(r"^### `(\w+)\(.*\)`$", re.MULTILINE)


def reference(page: str) -> str:
    """Return the page with the generated part of every hook written anew."""
    heads, *sections = re.split(r"^(?=##+ )", page, flags=re.MULTILINE)
    return heads + "".join(_section(section) for section in sections)


def _section(section: str) -> str:
    heading = HEADING.match(section)
    if heading is None:
        return section
    by_hand = section.partition(BEGIN)[0].rstrip()
    return "\n\n".join([by_hand, BEGIN, *_facts(heading[1]), END]) + "\n\n"


def _facts(hook: str) -> Iterator[str]:
    spec = SPECS[hook]
    yield f"```text\n{signature(hook)}\n```"
    rows = [("called", KIND[spec.kind]), ("results", COMBINE[spec.combine])]
    rows += [("passed on as", f"`{spec.folds}`")] if spec.folds else []
    rows += [("role", f"`{spec.role}`: a plan has one such plugin")] if spec.role else []
    rows += [("used by", ", ".join(users(hook)) or "no plugin of Pitlane; the example shows it")]
    yield "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])
    example = example_of(hook)
    home = home_of(example)
    if home == hook:
        yield f"```python\n{inspect.getsource(example).rstrip()}\n```"
    else:
        arguments = ", ".join(inspect.signature(getattr(hookspecs, home)).parameters)
        yield f"Example: `{example.__name__}` under [`{home}`](#{anchor(f'{home}({arguments})')})."


def anchor(heading: str) -> str:
    """The anchor that a heading gets on the site and on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def signature(hook: str) -> str:
    """The signature with its types, in one line or, if it is long, with a line per argument."""
    function = getattr(hookspecs, hook)
    types = {name: text.replace("SequenceOf[", "list[") for name, text in function.__annotations__.items()}
    result = types.pop("return")
    arguments = [f"{name}: {text}" for name, text in types.items()]
    line = f"{hook}({', '.join(arguments)}) -> {result}"
    return line if len(line) <= 110 else f"{hook}(\n    " + ",\n    ".join(arguments) + f",\n) -> {result}"


def users(hook: str) -> list[str]:
    """Built-in plugins and example packages with this hook."""
    own = [f"[`{e.name}`](plugins.md#{e.name})" for e in PluginRegistry.load() if hook in e.hooks]
    packages = sorted((FOLDER.parent / "examples").glob("pitlane-*/src/*.py"))
    return own + [_package_link(path) for path in packages if hook in _methods(path)]


def _package_link(module: Path) -> str:
    folder = module.parents[1].name
    return f"[{folder}](../examples/{folder}/README.md)"


def _methods(path: Path) -> set[str]:
    """Names of the functions of a file that carry `@hookimpl`."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return {
        f.name for f in functions for mark in f.decorator_list if isinstance(mark, ast.Name) and mark.id == "hookimpl"
    }


def examples() -> list[type[Plugin]]:
    """The plugin classes of docs/hook_examples.py, in the order of the file."""
    module = sys.modules.get("hook_examples")
    if module is None:
        spec = importlib.util.spec_from_file_location("hook_examples", FOLDER / "hook_examples.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules["hook_examples"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == "hook_examples"
            and issubclass(value, Plugin)]  # fmt: skip


def example_of(hook: str) -> type[Plugin]:
    """The first example that implements a hook."""
    return next(example for example in examples() if hook in hooks_of(example))


def home_of(example: type[Plugin]) -> str:
    """The hook under which an example is shown: that of its role, else its first hook."""
    own = [hook for hook in hooks_of(example) if example_of(hook) is example]
    return next((hook for hook in own if example.role is not None and SPECS[hook].role == example.role), own[0])
