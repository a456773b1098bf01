"""The shipped adapter `documents`: SmolLM2 answers questions about a document (storage/adapters.py)."""
