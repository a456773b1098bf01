"""Kernels in Triton, for CUDA. Under TRITON_INTERPRET=1 they run on a CPU, slowly: so tests prove them without a GPU."""
