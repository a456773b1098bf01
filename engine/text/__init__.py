"""Text and documents to tokens, and tokens back to text."""
