"""Where the Triton kernels run: on CUDA, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Whether Triton interprets kernels. Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serves(device: torch.device) -> bool:
    """Whether Triton kernels, not the kernels in C, are the kernels of a device."""
    return device.type == "cuda" or (device.type == "cpu" and interpreted())


@cache
def is_installed() -> bool:
    """Whether Triton can be imported. It has no build for macOS and Windows."""
    return find_spec("triton") is not None


def unsupported(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot run a model of this dtype and device; None if they can."""
    if not serves(device):
        return f"Triton kernels are for CUDA; the model runs on {device}"
    if not is_installed():
        return "Triton is not installed; it comes with the CUDA build of torch, or by `pip install triton`"
    if dtype not in DTYPES:
        return f"Triton kernels are for bfloat16, float16 and float32, not for {str(dtype).removeprefix('torch.')}"
    return None


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`: Triton's tiles have such sizes."""
    return 1 << max(0, number - 1).bit_length()


def has_descriptors(device: torch.device) -> bool:
    """Whether the kernels with tensor descriptors serve a device: from sm_90 on, a unit copies whole tiles (TMA)."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor may describe a tensor: address and strides are multiples of 16 bytes; the last stride is 1."""
    strides = (stride * tensor.element_size() for stride in tensor.stride()[:-1])
    return tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1 and all(stride % 16 == 0 for stride in strides)


def num_programs(device: torch.device) -> int:
    """Programs of a persistent grid: the multiprocessors of a GPU; 3 under the interpreter, so that a program takes many tiles."""
    return 3 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
