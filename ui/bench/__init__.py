"""Measuring: speed through the engine, beside transformers, and plan by plan. `pitlane bench` is the way in."""
