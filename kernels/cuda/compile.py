"""Compiles the Triton kernels ahead of time for a GPU that is not there.

`python -m pitlane.kernels.cuda.compile [--quick] [CAPABILITY ...]`. --quick: every fifth configuration of each kernel.

Prints registers, spilled bytes and shared memory of every kernel and configuration, from `cuobjdump` and Triton. Needs no GPU.
CAPABILITY: 80, 90, 100. Prints a table and, as the last line, one JSON document. The exit status is 1 if a kernel spills
registers or needs more shared memory than the GPU has.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pitlane.kernels.cuda.configurations import Configuration, configurations

QUICK, QUICK_STEP = "--quick", 5
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # largest shared memory of a block


@dataclass(frozen=True, slots=True)
class Compiled:
    """registers: of a thread. spilled: bytes of the stack of a thread, where registers spill. shared: bytes of a block."""

    kernel: str
    configuration: str
    capability: int
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_BYTES[self.capability]


def sample(capability: int, step: int) -> Iterator[Configuration]:
    """Every `step`-th configuration of each kernel, with its first."""
    counts = Counter[str]()
    for configuration in configurations(capability):
        kernel = configuration[1].__name__ + configuration[1].fn.__module__
        if counts[kernel] % step == 0:
            yield configuration
        counts[kernel] += 1


def compile_for(capability: int, half: str = "bf16", step: int = 1) -> Iterator[Compiled]:
    """Compile the `sample` of configurations for a GPU of this capability (90: Hopper). half: the type of 16 bits, bf16 or fp16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, kernel, types, constants, num_warps, num_stages in sample(capability, step):
        types = {parameter: kind.replace("bf16", half) for parameter, kind in types.items()}
        signature = {parameter: types.get(parameter, "constexpr") for parameter in kernel.arg_names}
        attributes = {
            (index,): [["tt.divisibility", 16]]
            for index, parameter in enumerate(kernel.arg_names)
            if str(types.get(parameter)).startswith("*")
        }
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        registers, stack = _resources(compiled.asm["cubin"])
        kind = Path(inspect.getfile(kernel.fn)).stem
        yield Compiled(f"{kind}.{kernel.__name__}", name, capability, registers, stack, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of the stack of a thread: registers spill to the stack, and no kernel has other data there."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (max(map(int, re.findall(rf"{name}:(\d+)", log))) for name in ("REG", "STACK"))
    return registers, stack


def main() -> int:
    """Run the command line."""
    wanted = [argument for argument in sys.argv[1:] if argument != QUICK]
    step = QUICK_STEP if QUICK in sys.argv[1:] else 1
    rows = [row for capability in map(int, wanted or ("80", "90", "100")) for row in compile_for(capability, step=step)]
    for row in rows:
        mark = "" if row.fits else "  DOES NOT FIT"
        place = f"sm_{row.capability} {row.kernel:30} {row.configuration:32}"
        print(f"{place} {row.registers:4} registers {row.spilled:4} spilled {row.shared:7} shared{mark}")
    print(json.dumps([asdict(row) for row in rows]))
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
