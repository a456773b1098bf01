"""The style sheet of the page: text that can be read in both palettes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pitlane.ui import app

TEXT = ("ink", "soft", "faint", "accent", "amber", "red")
GROUNDS = ("paper", "surface", "sunken")
READABLE = 4.5  # WCAG 2.2, AA, text of normal size


def palettes() -> dict[str, dict[str, str]]:
    """The colours of both palettes by their names."""
    sheet = (Path(app.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = (re.search(rf"^{start}.*?{{(.*?)}}", sheet, re.S | re.M) for start in (r":root", r"\.dark"))
    assert light and dark
    return {
        name: dict(re.findall(r"--([\w-]+): (#\w{6})", found[1])) for name, found in (("light", light), ("dark", dark))
    }


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(
        4.48, abs=0.01
    )


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_can_be_read_on_every_ground(name: str) -> None:
    colours = palettes()[name]
    pairs = [(text, ground) for text in TEXT for ground in GROUNDS]
    pairs += [(kind, f"{kind}-wash") for kind in ("accent", "amber", "red")]
    pairs += [("ink", "accent-wash"), ("soft", "accent-wash"), ("faint", "accent-wash"), ("accent-ink", "accent")]
    pale = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: round(found, 2) for pair, found in pale.items() if found < READABLE} == {}
