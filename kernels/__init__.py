"""Kernels: Triton (GPU) and C (CPU), each beside its torch reference. Imports nothing of the project."""
