"""What a user of `pitlane train` and `pitlane distill` can cause: messages name the value and the way out."""

from __future__ import annotations

from pitlane.storage.errors import PitlaneError


class TrainingError(PitlaneError):
    """The data, the models, the settings or the run itself do not allow to train on."""
