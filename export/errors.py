"""The error that a user of `pitlane quantize` can cause. A message names the value and says what to do."""

from __future__ import annotations

from pitlane.storage.errors import PitlaneError


class ExportError(PitlaneError):
    """A model cannot be quantized or written, because of the method, the format, the model, the folder or the disk."""
