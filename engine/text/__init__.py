"""From text and documents to tokens and back."""
