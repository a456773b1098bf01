"""GGUF files: read once into a cached model folder. From then on the model is an ordinary folder; nothing else knows GGUF."""
