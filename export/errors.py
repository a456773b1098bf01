"""The error that a user of `pitlane quantize` can cause. Messages name the value and the way out."""

from __future__ import annotations

from pitlane.storage.errors import PitlaneError


class ExportError(PitlaneError):
    """A model cannot be quantized or written: method, format, model, folder or disk do not allow it."""
