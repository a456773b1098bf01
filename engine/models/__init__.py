"""Models: families as data, one decoder, layers, weights, and the registry that finds a model by its name."""
