"""The files of a new plugin package, for `pitlane plugins new`. Knows no plugin and writes no file.

The package holds a drafter that works at once: it passes `pitlane plugins check` and its own tests before its author changes it.
"""

from __future__ import annotations

import keyword
import re

from pitlane import BadOption, __version__, api_version

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{package}"
version = "0.1.0"
description = "{title}: a plugin for Pitlane."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["pitlane>={version}"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points.pitlane]
{name} = "{module}:{class_name}"

[tool.setuptools]
py-modules = ["{module}"]

[tool.pytest.ini_options]
testpaths = ["tests"]
"""

MODULE = '''\
"""{title}: draft the tokens that followed the last tokens at an earlier place.

Changes in the loop: `propose` drafts a copy of earlier text.
Exactness: identical. Costs: a search through the text in every step. Helps if the answer repeats the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from pydantic import Field

from pitlane import Draft, Plugin, PluginOptions, Sequence, hookimpl

if TYPE_CHECKING:
    from pitlane import Limits


class {class_name}(Plugin):
    name, role, exactness = "{name}", "drafter", "identical"
    api_version = "{api_version}"

    class Options(PluginOptions):
        match: int = Field(2, ge=1, le=8, title="Match", description="number of last tokens to look up")

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None]:
        pairs = zip(seqs, limits.num_draft_tokens, strict=True)
        return [self.draft(seq.token_ids, limit) if limit else None for seq, limit in pairs]

    def draft(self, token_ids: list[int], limit: int) -> Draft | None:
        """Return the tokens behind the latest earlier place of the last `match` tokens."""
        size = self.options.match
        for start in range(len(token_ids) - size - 1, -1, -1):
            if token_ids[start : start + size] == token_ids[-size:]:
                return Draft(token_ids[start + size : start + size + limit])
        return None
'''

TEST = '''\
"""The contract of Pitlane's plugins, on {class_name}. `pitlane_registry` comes with Pitlane."""

import pytest
from {module} import {class_name}

from pitlane import BadOption
from pitlane.testing import check_plugin


@pytest.mark.parametrize("match", [1, 2])
def test_contract(pitlane_registry, match):
    check = check_plugin({class_name}, {{"match": match}}, registry=pitlane_registry)
    check.assert_proved()


def test_options_are_checked():
    with pytest.raises(BadOption, match="{name}.match"):
        {class_name}.parse_options({{"match": 0}})
'''

README = """\
# {package}

{title}: a plugin for [Pitlane](https://pypi.org/project/pitlane/), an LLM inference engine whose optimisations are plugins.

```sh
pip install -e .
pitlane plugins check {name}
pitlane run --plugins +{name} "one, two, three, one, two, three, one, two,"
```

| option | default | meaning |
|---|---|---|
| `match` | 2 | number of last tokens to look up |

Tests: `pip install -e '.[test]'`, then `pytest`.
"""

WORKFLOW = """\
name: test
on: [push, pull_request]
jobs:
  test:
    runs-on: ubuntu-latest
    strategy:
      matrix:
        python: ["3.11", "3.13"]
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: ${{{{ matrix.python }}}}
      - run: pip install -e '.[test]'
      - run: pytest
      - run: pitlane plugins check {name}
"""

FILES = {
    "pyproject.toml": PYPROJECT,
    "{module}.py": MODULE,
    "tests/test_{name}.py": TEST,
    "README.md": README,
    ".github/workflows/test.yml": WORKFLOW,
    ".gitignore": "__pycache__/\n*.egg-info/\nbuild/\ndist/\n",
}


def files(idea: str) -> dict[str, str]:
    """Return the texts of a package by path. idea: words such as `my-idea`; the package is `pitlane-my-idea`."""
    name = re.sub(r"[-\s.]+", "_", idea.strip().lower()).removeprefix("pitlane_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise BadOption(f"a plugin needs a name of letters, digits and dashes that begins with a letter, got {idea!r}")
    words = [word for word in name.split("_") if word]
    values = {
        "name": name,
        "package": f"pitlane-{'-'.join(words)}",
        "module": f"pitlane_{name}",
        "class_name": "".join(word.capitalize() for word in words),
        "title": " ".join(words).capitalize(),
        "version": __version__,
        "api_version": api_version,
    }
    return {path.format(**values): text.format(**values) for path, text in FILES.items()}
