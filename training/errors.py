"""The error that a user of `pitlane train` or `pitlane distill` can cause. Messages name the value and the way out."""

from __future__ import annotations

from pitlane.storage.errors import PitlaneError


class TrainingError(PitlaneError):
    """The run cannot start or go on: data, models, settings or files do not allow it."""
