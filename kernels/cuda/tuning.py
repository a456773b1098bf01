"""Sizes of tiles, warps and stages of the Triton kernels, by kernel, number of rows and GPU.

`python -m pitlane.kernels.cuda.measure --tune` times the candidates on a GPU and writes a table, tables/<device>.json: the fastest
candidate of every kernel, its time and the time of the default. A kernel asks `chosen`: first the table of this GPU, then the table
of another GPU of the same capability, then `default`. No table is there yet: no GPU has run the kernels. The defaults spill no
registers for sm_80, sm_90 and sm_100 (compile.py).
Layout of a table: {"device", "capability": [9, 0], "triton", "torch", "choices": [{"kernel", "rows", "form", "ms", "default_ms"}]},
where "form" has the fields of `Form`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pitlane.kernels.cuda.device import interpreted

FOLDER = Path(__file__).with_name("tables")
CLASSES = (16, 64, 0)  # largest number of rows of every class; 0: more rows
LINEARS = ("int8", "int4 g32", "int4 g64", "int4 g128", "fp8 W8A16", "fp8 W8A8")
HEADS = (64, 80, 96, 128, 256)  # sizes of heads


class Form(NamedTuple):
    """block_m, block_n, block_k: rows, outputs or keys, and inputs of a tile. descriptors: load tiles by tensor descriptors.

    specialised: some warps of a program load tiles, the others multiply.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    specialised: bool = False

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


Choices = dict[tuple[str, int], Form]


def class_of(rows: int) -> int:
    """The class of a number of rows: 16, 64, or 0 for more."""
    return next((size for size in CLASSES if rows <= size), 0)


def plain(kernel: str, rows: int) -> Form:
    """The default without descriptors, for every GPU. kernel: a name of LINEARS, or `attention D <size of heads>`."""
    size = class_of(rows)
    if kernel.startswith("attention"):
        dim = int(kernel.split()[-1])
        if size == 16:  # fewer warps, or 2 stages for small heads, spill registers on a GPU
            return Form(16, 32, dim, 8 if dim >= 128 else 4, 3 if dim <= 64 else 2)
        return Form(64 if dim <= 64 else 32, 32, dim, 8, 2)
    block_m, warps = {16: (16, 4), 64: (32, 8), 0: (64, 8)}[size]
    if kernel.startswith("fp8"):
        return Form(block_m, 64, 64, warps, 3)
    inputs = 64 if kernel == "int8" else int(kernel.split("g")[-1])
    return Form(block_m, 32 if inputs == 128 and size != 16 else 64, inputs, warps, 2)


def default(kernel: str, rows: int, capability: tuple[int, int]) -> Form:
    """The choice without a table. Many rows of fp8 run by descriptors from sm_90 on."""
    if class_of(rows) or not kernel.startswith("fp8") or capability < (9, 0):
        return plain(kernel, rows)
    # Triton 3.9 specialises warps for sm_90 in the product of fp8 by fp8 alone: the other loop fails to compile so
    return Form(64, 128, 128, 4, 3, True, capability[0] == 9) if "W8A8" in kernel else Form(128, 64, 64, 8, 4, True)


def candidates(kernel: str, rows: int, capability: tuple[int, int]) -> list[Form]:
    """The forms to time, the default first."""
    base = plain(kernel, rows)
    forms = [default(kernel, rows, capability), base]
    forms += [base._replace(num_stages=stages) for stages in (2, 3, 4)]
    forms += [base._replace(num_warps=warps) for warps in (4, 8) if warps * 16 >= base.block_m]
    if not kernel.startswith("attention"):
        forms += [base._replace(block_n=size) for size in (32, 64, 128)]
    if not class_of(rows) and kernel.startswith("fp8") and capability >= (9, 0):
        wide = Form(128, 128, 128 if "W8A8" in kernel else 64, 8, 3, True)
        forms += [wide, wide._replace(num_stages=4), wide._replace(block_m=64, num_warps=4)]
    return list(dict.fromkeys(forms))


def chosen(kernel: str, rows: int, device: torch.device) -> Form:
    """The form of a kernel for a number of rows: from a table, or the default. Under the interpreter: the plain default."""
    if device.type != "cuda" or interpreted():
        return plain(kernel, rows)
    capability = torch.cuda.get_device_capability(device)
    choice = table_of(torch.cuda.get_device_name(device), capability).get((kernel, class_of(rows)))
    return choice or default(kernel, rows, capability)


@cache
def table_of(device: str, capability: tuple[int, int], folder: Path = FOLDER) -> Choices:
    """The choices for a GPU: its own table, else the first table of its capability, else none."""
    tables = [read(path) for path in sorted(folder.glob("*.json"))]
    tables.sort(key=lambda table: table["device"] != device)  # a stable sort: the own table first
    fitting = (table for table in tables if table["device"] == device or table["capability"] == capability)
    return next((table["choices"] for table in fitting), {})


def read(path: Path) -> dict[str, Any]:
    """Read a table: its fields, with `choices` as `Choices`. Raises ValueError if a field is missing or wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        capability = tuple(document["capability"])
        choices = dict(_choices(document["choices"], capability))
        return {**document, "device": str(document["device"]), "capability": capability, "choices": choices}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tuning table ({error!r}); delete it, or write it again with --tune") from error


def _choices(entries: list[dict[str, Any]], capability: Any) -> Iterator[tuple[tuple[str, int], Form]]:
    for entry in entries:
        form, kernel, rows = Form(**entry["form"]), entry["kernel"], entry["rows"]
        if kernel not in kernels() or rows not in CLASSES:
            raise ValueError(f"no kernel {kernel!r} with rows {rows!r}")
        if form not in candidates(kernel, rows or 10**6, capability):
            raise ValueError(f"{kernel} has no candidate {form}")
        yield (kernel, rows), form


def kernels() -> list[str]:
    """The names of all kernels that a table may name."""
    return [*LINEARS, *(f"attention D {dim}" for dim in HEADS)]


def write(path: Path, device: str, capability: tuple[int, int], choices: list[dict[str, Any]]) -> None:
    """Write a table. choices: entries as in the module's text, with `form` a `Form`."""
    import triton

    entries = [{**entry, "form": entry["form"]._asdict()} for entry in choices]
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    document = {"device": device, "capability": list(capability), **versions, "choices": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
