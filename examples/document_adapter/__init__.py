"""The recipe of the document adapter of SmolLM2; see README.md."""
