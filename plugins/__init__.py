"""Built-in plugins, one optimisation per file, written on the same public face as third-party ones."""
