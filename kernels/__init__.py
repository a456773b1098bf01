"""Kernels in Triton (GPU) and C (CPU), each beside a reference in torch. Imports no other room of the project."""
