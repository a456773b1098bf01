"""Built-in plugins, one optimisation per file. They use the same public interface as third-party plugins."""
