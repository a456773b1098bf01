"""Measurements behind `pitlane bench`: speed of the engine, of transformers beside it, and of plugin sets."""
