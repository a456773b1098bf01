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

FORMATS = ("compressed-tensors", "gptq", "awq", "gguf")
METHODS = ("rtn", "gptq", "awq")
GROUP_SIZES = {"gguf": 32}
DEFAULT_GROUP = 128


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
@click.option("--bits", type=click.IntRange(2, 8), default=4, show_default=True, metavar="N", help="Of a weight.")
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
@click.option("--resume", is_flag=True, help="Go on where a killed run stopped; the result is the same.")
@click.option("--threads", type=THREADS, metavar="N", help="CPU threads.  [default: all cores]")
@as_json
def quantize(
    model: str,
    out: Path,
    method: str,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    layout: str,
    resume: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Quantize MODEL, layer by layer, into --out.

    The linears of the layers get --bits; embedding and head stay as they are (gguf: 8 bits). docs/formats.md lists the programs
    that read the files. `pitlane run --model DIR` runs them.

    \b
    pitlane quantize bundled --out bundled-int4
    pitlane quantize mymodel --bits 8 --out mymodel-int8
    pitlane quantize mymodel --format gguf --out mymodel-gguf
    """
    import torch

    from pitlane import PluginRegistry
    from pitlane.export.gguf_file import quantize_gguf
    from pitlane.export.layouts import Settings, plugins_of
    from pitlane.export.quantize import quantize as write
    from pitlane.formats import calibrated, resolve

    if threads:
        torch.set_num_threads(threads)
    if group_size is None:
        group_size = GROUP_SIZES.get(layout, 0 if bits == 8 else DEFAULT_GROUP)
    registry = PluginRegistry.load()
    source = resolve(model, registry)
    settings = Settings(method, bits, group_size, symmetric, layout)
    function = quantize_gguf if layout == "gguf" else write
    plugins = plugins_of(settings)
    started = time.monotonic()
    with torch.inference_mode():
        made = calibrated(source, plugins, registry) if plugins else None
        if made is not None:
            note(f"recipe of {method} in {time.monotonic() - started:.1f} s")
        result = function(source, settings, out, _line, resume, made)
    if as_json:
        print_json(asdict(result) | {"folder": str(result.folder), "settings": asdict(settings)})
        return
    note(
        f"{result.linears} linears in {result.seconds:.1f} s: {size(result.num_bytes)} in place of {size(result.dense_bytes)}"
    )
    say(f"{result.folder}: try it with  pitlane chat --model {result.folder}")


def _line(done: Done) -> None:
    note(f"{done.linears} of {done.of} linears, {size(done.num_bytes)}, {done.seconds:.1f} s")
