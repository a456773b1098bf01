"""Calibration: the inputs of every linear over a text, layer by layer, and the recipes that plugins make of them.

`recipe.py` holds the data: statistics, recipes, the `Calibrator` that a plugin sees. `inputs.py` gathers the inputs of a linear.
`walk.py` runs the dense model layer by layer. `calibrator.py` joins them: it builds a recipe once, and goes on where it was killed.
"""
