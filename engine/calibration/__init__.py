"""Calibration: the inputs of every linear over a text, layer by layer, and the recipes that plugins make of them.

`recipe.py` holds the data: statistics, recipes, and the `Calibrator` that a plugin sees. `inputs.py` gathers the inputs of a
linear. `walk.py` runs the dense model layer by layer. `calibrator.py` uses all three: it builds a recipe once, and resumes a build
that was killed. `kept.py` lists and deletes recipes, and keeps them within a limit.
"""
