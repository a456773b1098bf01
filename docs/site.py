"""Hooks of mkdocs: pages from outside docs/, and links as they are in the repository.

Files link to each other by their places in the repository. On the site, README.md is the home page, and a page from outside docs/
has its path behind `repository/`. A link to another file becomes plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
PICTURES = (".png", ".gif", ".svg")


def on_files(files: Any, config: Any) -> Any:
    """Add the home page, and all pages and pictures that the pages link to."""
    from mkdocs.structure.files import File

    waiting = ["README.md", *(f"docs/{path}" for path in files.src_uris if path.endswith(".md"))]
    waiting += ["CHANGELOG.md", "CONTRIBUTING.md"]
    while waiting:
        path = waiting.pop()
        for target in _targets(path):
            if site_path(target) is not None and files.get_file_from_path(site_path(target)) is None:
                waiting.append(target)
        if files.get_file_from_path(site_path(path)) is None:
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of a page to places on the site."""
    return _outside_code(
        markdown, lambda text: LINK.sub(lambda link: moved(link, repository_path(page.file.src_uri)), text)
    )


def moved(link: re.Match[str], path: str) -> str:
    """A link of the file `path`, as it is on the site."""
    mark, text, address = link.groups()
    if re.match(r"[a-z]+:|#", address):
        return link[0]
    file, _, anchor = address.partition("#")
    target = site_path(normpath(join(dirname(path), file)))
    if target is None:
        return str(text)
    place = relpath(target, dirname(str(site_path(path))) or ".")
    return f"{mark}[{text}]({place}{'#' + anchor if anchor else ''})"


def site_path(path: str) -> str | None:
    """Where a file of the repository is on the site; None for a file that the site does not show."""
    if not path.endswith((".md", *PICTURES)) or not (ROOT / path).is_file():
        return None
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{OUTSIDE}/{path}"


def repository_path(place: str) -> str:
    """Where a page of the site is in the repository."""
    if place == "index.md":
        return "README.md"
    return place.removeprefix(f"{OUTSIDE}/") if place.startswith(f"{OUTSIDE}/") else f"docs/{place}"


def _targets(path: str) -> list[str]:
    if not path.endswith(".md"):
        return []
    addresses: list[str] = []
    _outside_code((ROOT / path).read_text(encoding="utf-8"), lambda text: (addresses.extend(_addresses(text)), text)[1])
    return [normpath(join(dirname(path), address.partition("#")[0])) for address in addresses]


def _addresses(text: str) -> list[str]:
    return [link[3] for link in LINK.finditer(text) if not re.match(r"[a-z]+:|#", link[3])]


def _outside_code(markdown: str, change: Any) -> str:
    """Apply a function to all text outside of code blocks."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))
