"""`pitlane quantize`: write a model with weights of 2 to 8 bits, in a format that other programs read."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pitlane.ui.commands.options import THREADS, as_json
from pitlane.ui.render import note, print_json, say, size

if TYPE_CHECKING:
    from pitlane.export.quantize import Done
    from pitlane.export.settings import Settings

FORMATS = ("compressed-tensors", "gptq", "awq", "gguf")
METHODS = ("rtn", "gptq", "awq", "mixed", "smoothquant", "fp8")
GRANULARITIES = ("channel", "tensor", "block")
BITS = {"mixed": 5.0, "smoothquant": 8.0, "fp8": 8.0}
DEFAULT_BITS, DEFAULT_GROUP = 4.0, 128


@click.command()
@click.argument("model")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="Folder for the checkpoint; with gguf for model.gguf.",
)
@click.option("--method", type=click.Choice(METHODS), default="rtn", show_default=True, help="rtn: to nearest.")
@click.option(
    "--bits",
    type=click.FloatRange(2, 8),
    metavar="N",
    help="Of a weight; with mixed the mean of all linears, such as 4.5.  [default: 4; mixed: 5; smoothquant, fp8: 8]",
)
@click.option(
    "--group-size",
    type=click.IntRange(0),
    metavar="N",
    help="Inputs that share a scale; 0: all.  [default: 128; 8 bits: 0; gguf: 32]",
)
@click.option("--symmetric/--asymmetric", default=True, show_default=True, help="asymmetric stores zero points.")
@click.option(
    "--format", "layout", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True, help="Of the files."
)
@click.option(
    "--granularity", type=click.Choice(GRANULARITIES), help="fp8: weights that share a scale.  [default: channel]"
)
@click.option("--resume", is_flag=True, help="Go on where a killed run stopped; the result is the same.")
@click.option("--threads", type=THREADS, metavar="N", help="CPU threads.  [default: all cores]")
@as_json
def quantize(
    model: str,
    out: Path,
    method: str,
    bits: float | None,
    group_size: int | None,
    symmetric: bool,
    layout: str,
    granularity: str | None,
    resume: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Quantize MODEL, layer by layer, into --out.

    The linears of the layers get --bits; embedding and head stay as they are (gguf: 8 bits). docs/formats.md lists the programs
    that read the files. `pitlane run --model DIR` runs them.

    \b
    pitlane quantize bundled --out bundled-int4
    pitlane quantize mymodel --method mixed --bits 4.5 --out mymodel-mixed
    pitlane quantize mymodel --method fp8 --granularity block --out mymodel-fp8
    pitlane quantize mymodel --format gguf --out mymodel-gguf
    """
    import torch

    from pitlane import PluginRegistry
    from pitlane.export.gguf_file import quantize_gguf
    from pitlane.export.quantize import quantize as write
    from pitlane.export.settings import plugins_of
    from pitlane.formats import calibrated, resolve

    if threads:
        torch.set_num_threads(threads)
    settings = _settings(method, bits, group_size, symmetric, layout, granularity)
    registry = PluginRegistry.load()
    source = resolve(model, registry)
    function = quantize_gguf if layout == "gguf" else write
    plugins = plugins_of(settings)
    started = time.monotonic()
    with torch.inference_mode():
        made = calibrated(source, plugins, registry) if plugins else None
        if made is not None:
            note(f"recipe of {method} in {time.monotonic() - started:.1f} s")
        result = function(source, settings, out, _line, resume, made)
    if as_json:
        print_json(asdict(result) | {"folder": str(result.folder), "settings": settings.to_json()})
        return
    note(
        f"{result.linears} linears in {result.seconds:.1f} s: {size(result.num_bytes)} in place of {size(result.dense_bytes)}"
    )
    say(f"{result.folder}: try it with  pitlane chat --model {result.folder}")


def _settings(
    method: str, bits: float | None, group_size: int | None, symmetric: bool, layout: str, granularity: str | None
) -> Settings:
    """The settings of the flags, with the defaults of the method and of the format."""
    from pitlane.export.settings import Settings

    width = bits or BITS.get(method, DEFAULT_BITS)
    if granularity and method != "fp8":
        raise click.UsageError(f"--granularity is for --method fp8, and {method} has none; leave it out")
    if method == "mixed":
        if group_size is not None:
            raise click.UsageError("mixed chooses the groups of every linear; leave --group-size out")
        return Settings(method, symmetric=symmetric, format=layout, budget=width)
    if width != int(width):
        raise click.UsageError(
            f"--bits must be a whole number with {method}, got {width:g}; --method mixed takes {width:g}"
        )
    if group_size is None:
        group_size = 0 if width == 8 else DEFAULT_GROUP
        group_size = 32 if layout == "gguf" else group_size
    given = granularity or "channel" if method == "fp8" else ""
    return Settings(method, int(width), group_size, symmetric, layout, given)


def _line(done: Done) -> None:
    note(f"{done.linears} of {done.of} linears, {size(done.num_bytes)}, {done.seconds:.1f} s")
