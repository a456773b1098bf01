"""Models: configuration, weights, shared layers, one file per architecture, and the registry that finds them."""
