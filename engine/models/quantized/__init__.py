"""Quantized checkpoints: config, tensors and weights. A module reads one format; its name is the `quant_method` of the format."""
