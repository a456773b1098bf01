"""The site: mkdocs builds it with no warning, so every link and every anchor has a target, in the pages outside docs/ too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="tutorial/"' in home and "fonts.googleapis.com" not in home
    package = (tmp_path / "site" / "repository" / "examples" / "pitlane-watermark" / "index.html").read_text("utf-8")
    assert "pitlane-watermark story.txt" in re.sub(r"<[^>]*>", "", package)


@pytest.mark.parametrize("path", ["docs/tutorial.md", "docs/hooks.md", "docs/writing-plugins.md"])
def test_links_of_the_pages_for_authors_have_targets(path: str) -> None:
    """The same for three pages, without mkdocs."""
    page = ROOT / path
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?![a-z]+:)([^()\s]+)\)", text)
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), f"{path} links to {link}"
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{path} links to {link}"
