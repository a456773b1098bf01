"""Decodes a GGUF model into a safetensors file, written as a stream: header first, then a few rows at a time.

Memory does not depend on the size of the model: chunks of about 1 MB of values are decoded by a few threads and written in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from pitlane.engine.errors import ModelError
from pitlane.engine.models.gguf.blocks import TensorInfo, decode
from pitlane.engine.models.gguf.names import unpermuted
from pitlane.engine.models.gguf.reader import rows

CHUNK = 2**18  # values; `gguf` is slower with larger and with smaller arrays
THREADS = 2  # numpy releases the interpreter lock for most of the work
SPELLINGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # names of dtypes in safetensors
Progress: TypeAlias = Callable[[int, int], None]  # bytes of the GGUF file decoded so far, and in all


@dataclass(frozen=True, slots=True)
class Job:
    """A tensor to decode. name: in the safetensors file. head_dim: size of the heads whose rows are permuted; 0: none.

    offset: subtracted from all values.
    """

    name: str
    info: TensorInfo
    head_dim: int = 0
    offset: float = 0.0

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows, of about CHUNK values, of whole heads if rows are permuted. A tensor of one dimension is one row."""
        unit = self.head_dim if len(self.info.shape) > 1 else 0
        step = max(1, CHUNK // self.info.shape[-1])
        step = -(-step // unit) * unit if unit else step
        for start in range(0, self.info.num_rows, step):
            yield start, min(start + step, self.info.num_rows)


def header_bytes(jobs: list[Job], dtype: str) -> bytes:
    """The head of the safetensors file: length, then JSON with the places of all tensors, padded to 8 bytes."""
    places: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, width = 0, getattr(torch, dtype).itemsize
    for job in jobs:
        start, end = end, end + prod(job.info.shape) * width
        places[job.name] = {"dtype": SPELLINGS[dtype], "shape": list(job.info.shape), "data_offsets": [start, end]}
    text = json.dumps(places).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(jobs: list[Job], dtype: str) -> int:
    """Bytes of the file that `write` writes."""
    width: int = getattr(torch, dtype).itemsize
    return len(header_bytes(jobs, dtype)) + sum(prod(job.info.shape) for job in jobs) * width


def write(jobs: list[Job], dtype: str, target: Path, progress: Progress) -> None:
    """Decode all tensors into `target`. Raises ModelError for values that are not finite, OSError if it cannot be written."""
    total, done = sum(job.info.num_bytes for job in jobs), 0
    tasks = ((job, start, stop) for job in jobs for start, stop in job.chunks())
    decode_chunk = partial(_decoded, getattr(torch, dtype))
    with open(target, "wb") as file, ThreadPoolExecutor(THREADS) as pool:
        file.write(header_bytes(jobs, dtype))
        while batch := list(islice(tasks, 2 * THREADS)):
            for values in pool.map(decode_chunk, *zip(*batch, strict=True)):
                file.write(values.view(torch.uint8).numpy().data)
            done += sum((stop - start) * job.info.row_bytes for job, start, stop in batch)
            progress(done, total)


def _decoded(dtype: torch.dtype, job: Job, start: int, stop: int) -> Tensor:
    """The values of a range of rows, flat, as they are stored in the safetensors file."""
    info = job.info
    values = decode(rows(info, start, stop), info.block)
    if job.head_dim:
        shape = (stop - start, info.shape[-1]) if len(info.shape) > 1 else info.shape
        values = unpermuted(values.reshape(shape), job.head_dim).reshape(-1)
    if job.offset:
        values = values - job.offset
    tensor = torch.from_numpy(values).to(dtype)
    if not tensor.isfinite().all():
        raise ModelError(f"{info.file}: tensor {info.name} holds values that are not finite; download it again")
    return tensor
