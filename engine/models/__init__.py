"""Models: configuration, weights, shared layers, one file per decoder, and the registry that finds a model."""
