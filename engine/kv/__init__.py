"""KV memory: who owns which block, and the tensors that hold keys and values."""
