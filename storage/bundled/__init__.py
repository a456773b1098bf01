"""The bundled model, its tokenizer and the sample document, as package data."""
