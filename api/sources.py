"""Models of the package index and the data folder: find, fetch, list, remove. Importing this module imports no torch.

A name as in `Engine(name)`: `smollm2`, or `pip:<distribution>==<version>`. `pitlane.models` knows the models of the Hugging Face
cache.
"""

from __future__ import annotations

from pitlane.engine.calibration.kept import RecipeFolder, recipe_folders, remove_recipe
from pitlane.engine.models.local import (
    DecodedModel,
    WheelModel,
    decoded_models,
    remove_decoded_model,
    remove_wheel_model,
    wheel_models,
)
from pitlane.engine.models.offline import VARIABLE as OFFLINE_VARIABLE
from pitlane.engine.models.offline import is_offline
from pitlane.engine.models.pip_download import Progress
from pitlane.engine.models.wheel import SMOLLM2, Pin, cached, fetch, find_pin

__all__ = [
    "OFFLINE_VARIABLE",
    "SMOLLM2",
    "DecodedModel",
    "Pin",
    "Progress",
    "RecipeFolder",
    "WheelModel",
    "cached",
    "decoded_models",
    "fetch",
    "find_pin",
    "is_offline",
    "recipe_folders",
    "remove_decoded_model",
    "remove_recipe",
    "remove_wheel_model",
    "wheel_models",
]
