"""Quantized checkpoints: their config, their tensors, and the weights in them. A format is a module; its name is the method's."""
