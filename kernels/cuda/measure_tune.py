"""Times the candidates of every kernel and writes the tuning table of a GPU, for `measure --tune` (tuning.py).

A candidate that does not compile, needs more shared memory than the GPU has, or gives a wrong result is left out. The default stays
unless another candidate is faster by GAIN. Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

from pitlane.kernels.cuda import linear, linear_fp8, tuning
from pitlane.kernels.cuda.measure_attention import Paged
from pitlane.kernels.cuda.measure_timer import MAX_ERROR, Call, Timer, error_of
from pitlane.kernels.cuda.tuning import Form
from pitlane.kernels.packing import Format
from pitlane.kernels.quantized import Quantized

FLAG = "--tune"
GAIN = 0.02  # of the time of the default; smaller gains are noise
ROWS = {16: 1, 64: 64, 0: 2048}  # rows that stand for a class
Times = Callable[[Mapping[str, Call]], dict[str, float]]


class Case(NamedTuple):
    """A kernel and a class of rows. prepare: the call with a form; error: of its result, relative to the largest value."""

    kernel: str
    rows: int
    prepare: Callable[[Form], Call]
    error: Callable[[Any], float]


def cases(timer: Timer) -> Iterator[Case]:
    """All cases of a table: linears of 4096 inputs and 14336 outputs, attention of 32 heads over 8 KV heads."""
    yield from _linears(timer)
    for dim in (64,) if timer.tiny else tuning.HEADS:
        for size, queries in ROWS.items():
            seqs = [(40, 1)] * 2 if timer.tiny else [(8192, 1)] * 32 if size == 16 else [(8192, queries)]
            paged = Paged(timer, seqs, (4, 2) if timer.tiny else (32, 8), dim)
            yield Case(f"attention D {dim}", size, paged.by_triton, paged.error)


def _linears(timer: Timer) -> Iterator[Case]:
    outputs, inputs = (48, 256) if timer.tiny else (14336, 4096)
    weight = timer.random(outputs, inputs)
    scales = weight.float().abs().amax(1) / linear_fp8.LARGEST
    small = (weight.float() / scales[:, None]).to(torch.float8_e4m3fn)
    formats = {"int8": Format(8), **{f"int4 g{size}": Format(4, False, size) for size in (32, 64, 128)}}
    packed = {
        name: Quantized(outputs, inputs, form, [weight.cpu()], device=timer.device) for name, form in formats.items()
    }
    for size, rows in ROWS.items():
        x = timer.random(min(rows, 2) if timer.tiny else rows, inputs)
        for name, form in packed.items():
            prepare = partial(_prepared, linear.linear, x, form)
            yield Case(name, size, prepare, partial(_error, form.reference(x)))
        for quantized in (False, True):
            call = partial(linear_fp8.linear, x, small, scales, quantized=quantized)
            expected = linear_fp8.linear_ref(x, small, scales, quantized=quantized)
            yield Case(
                f"fp8 {'W8A8' if quantized else 'W8A16'}", size, partial(_prepared, call), partial(_error, expected)
            )


def _prepared(call: Callable[..., object], *arguments: object) -> Call:
    *first, form = arguments
    return partial(call, *first, form=form)


def _error(expected: torch.Tensor, result: torch.Tensor) -> float:
    return error_of(result, expected)


def tune(cases: Iterable[Case], times: Times, capability: tuple[int, int]) -> list[dict[str, Any]]:
    """The entries of a table. times: seconds of every call that runs. Raises RuntimeError if no candidate of a case is right."""
    entries = []
    for case in cases:
        forms = tuning.candidates(case.kernel, case.rows or 10**6, capability)
        calls = {str(index): call for index, form in enumerate(forms) if (call := _right_call(case, form)) is not None}
        if not calls:
            raise RuntimeError(
                f"no candidate of {case.kernel} with rows {case.rows} is right; run measure without {FLAG}"
            )
        seconds = times(calls)
        fastest = min(seconds, key=lambda name: seconds[name])
        if "0" in seconds and seconds[fastest] > (1 - GAIN) * seconds["0"]:
            fastest = "0"
        default_ms = seconds["0"] * 1e3 if "0" in seconds else None
        choice = {"kernel": case.kernel, "rows": case.rows, "form": forms[int(fastest)]}
        entries.append({**choice, "ms": seconds[fastest] * 1e3, "default_ms": default_ms})
        print(
            f"{case.kernel}, rows {case.rows}: {entries[-1]['form']}, {entries[-1]['ms']:.3f} ms, default {default_ms} ms"
        )
    return entries


def _right_call(case: Case, form: Form) -> Call | None:
    """The call of a case with a form, or None if it does not run or is wrong."""
    try:
        call = case.prepare(form)
        return call if case.error(call()) <= MAX_ERROR else None
    except (RuntimeError, TritonError):
        return None


def main(timer: Timer, arguments: list[str]) -> int:
    """Write the table of this GPU. arguments: the file, or none."""
    if timer.device.type == "cuda":
        device, capability = torch.cuda.get_device_name(timer.device), torch.cuda.get_device_capability(timer.device)
    else:
        device, capability = "interpreter", (8, 0)
        if not arguments:
            raise SystemExit(
                f"{FLAG} on a CPU needs a FILE: its times mean nothing, so they do not belong into the package"
            )
    name = device.lower().replace(" ", "-").replace("/", "-")
    path = Path(arguments[0]) if arguments else tuning.FOLDER / f"{name}.json"
    entries = tune(cases(timer), timer.times, capability)
    tuning.write(path, device, capability, entries)
    print(f"wrote {path}: {len(entries)} choices")
    return 0
