"""Training: makers of training data and scripts that train or tune models for the engine."""
