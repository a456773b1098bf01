"""The bundled draft model: what `speculative` drafts with for the bundled model."""
