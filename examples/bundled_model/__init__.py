"""The recipe of the bundled model: its data, its training and its evaluation. Run from examples/; README.md says how."""
