"""The plugins on a GPU, for measure.py: `pitlane run` in a process of its own, the kernels in Triton beside the CPU.

First the answers: every set of plugins writes a short greedy answer of the bundled model in float32, on the GPU and on the CPU. The
bundled model comes with the package. A wrong kernel changes the answer from the first tokens on; rounding rarely does, so the first
FIRST_TOKENS tokens must be equal. Then decode: a model of random weights, and the fraction of the copy's bandwidth that reading its
weights once a token takes. Knows the plugins by their names on the command line alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

FIRST_TOKENS = 8
PROMPT = "Name a colour, and write a sentence about it."
SETS = (
    "fused_ops",
    "flash_attention",
    "int8",
    "int4",
    "fp8",
    "fused_ops,flash_attention,kv_quant",
    "fused_ops,flash_attention,int8,kv_quant,prompt_lookup",
)
DECODE = (
    "fused_ops,flash_attention",
    *(f"fused_ops,flash_attention,{linear}" for linear in ("int8", "int4", "fp8")),
)
WITHOUT = ("fused_ops", "flash_attention")  # have no kernels in C for float32: the core stands in for them on the CPU
COMMAND = (sys.executable, "-c", "from pitlane.ui.cli import main; main()", "run", "--json", "--offline")


@dataclass(frozen=True, slots=True)
class PluginRow:
    """A set of plugins. num_equal: leading tokens that equal the CPU's; None for decode.

    bandwidth: for decode, weight bytes per second as a fraction of the copy's. error: what is wrong; "" = nothing.
    """

    model: str
    plugins: str
    num_equal: int | None
    tokens_per_second: float
    bandwidth: float | None
    error: str

    @property
    def is_right(self) -> bool:
        return not self.error


def run(device: str, tiny: bool, bytes_per_second: float) -> list[PluginRow]:
    """Run all sets, and print a line for each. device: cuda, or cpu under the interpreter. tiny: a set over a tiny model."""
    rows = []
    model, sets = ("random:tiny", SETS[-1:]) if tiny else ("bundled", SETS)
    for plugins in sets:
        rows.append(_compared(device, model, plugins))
        print(_line(rows[-1]))
    for plugins in () if tiny else DECODE:
        rows.append(_decoded(device, "random:llama-1b", plugins, bytes_per_second))
        print(_line(rows[-1]))
    return rows


def _compared(device: str, model: str, plugins: str) -> PluginRow:
    dtype = "float32"
    on_device = answer(device, model, plugins, 2 * FIRST_TOKENS, dtype)
    rest = ",".join(name for name in plugins.split(",") if name not in WITHOUT)
    on_cpu = answer("cpu", model, rest, 2 * FIRST_TOKENS, dtype, by_interpreter=False)
    error = str(on_device.get("error") or on_cpu.get("error") or "")
    if error:
        return PluginRow(model, plugins, 0, 0.0, None, error)
    pairs = list(zip(on_device["token_ids"], on_cpu["token_ids"], strict=False))
    num_equal = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
    wanted = min(FIRST_TOKENS, len(pairs))
    error = "" if num_equal >= wanted and pairs else f"{num_equal} leading tokens equal the CPU's, not {wanted}"
    return PluginRow(model, plugins, num_equal, on_device["stats"]["tokens_per_second"], None, error)


def _decoded(device: str, model: str, plugins: str, bytes_per_second: float) -> PluginRow:
    result = answer(device, model, plugins, 128, "bfloat16")
    if "error" in result:
        return PluginRow(model, plugins, None, 0.0, None, result["error"])
    stats = result["stats"]
    bandwidth = stats["weight_bytes"] / (stats["tpot_ms"]["p50"] / 1e3) / bytes_per_second
    return PluginRow(model, plugins, None, stats["tokens_per_second"], bandwidth, "")


def answer(
    device: str, model: str, plugins: str, max_tokens: int, dtype: str, *, by_interpreter: bool = True
) -> dict[str, Any]:
    """The document of `pitlane run --json`, or {"error": text}. by_interpreter: keep TRITON_INTERPRET of the environment."""
    options = {
        "model": model,
        "device": device,
        "plugins": plugins,
        "max-tokens": max_tokens,
        "dtype": dtype,
        "temperature": 0,
    }
    if model == "random:tiny":  # at temperature 0 it stops after 2 tokens
        options |= {"temperature": 1, "seed": 1}
    command = [*COMMAND, *(f"--{name}={value}" for name, value in options.items()), PROMPT]
    environment = {name: value for name, value in os.environ.items() if by_interpreter or name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]}
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if document["stats"]["failed"]:
        return {"error": f"failed: {document['stats']['failed']}"}
    return document


def _line(row: PluginRow) -> str:
    figure = (
        f"{row.num_equal} tokens as on the CPU"
        if row.bandwidth is None
        else f"{row.bandwidth:.2f} of the copy's bandwidth"
    )
    return f"{row.model} {row.plugins}: {row.error or figure}, {row.tokens_per_second:.1f} tok/s"
