"""Offline mode: no model is fetched, neither from the Hugging Face hub nor from the package index.

PITLANE_OFFLINE=1 switches it on; the command line sets the variable for `--offline`.
"""

from __future__ import annotations

import os

VARIABLE = "PITLANE_OFFLINE"
OFF = ("", "0", "false", "no", "off", "f", "n")  # the values that click takes for false


def is_offline() -> bool:
    """Whether offline mode is on."""
    return os.environ.get(VARIABLE, "").strip().casefold() not in OFF


def refusal(name: str) -> str:
    """The message for a model that is missing in offline mode: what is missing, and the command that gets it."""
    return f"{name} is not on this machine, and offline mode ({VARIABLE}) fetches nothing; online: pitlane models pull {name}"
