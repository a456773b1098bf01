"""One forward of the model: which sequences are in it, as tensors, and what runs it."""
