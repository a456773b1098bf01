"""Quality over the bits of a whole model, for 2 to 8 bits and models of several sizes (Dettmers and Zettlemoyer 2022, figure 1).

    python docs/kbit.py TEXT [MODEL ...] [--skip N] [--tokens N] [--bits B ...] [--out FILE.png]

A model `NAME:4` is the first 4 layers of NAME, with its norm and head. The bundled model has a trained exit after 4 layers.
Every model is rounded to nearest in groups of 64 (`few_bits`). Quality is bits per byte of TEXT: it compares models with different
tokenizers, where perplexity does not. The bits of a model are those of its linears, with a scale of 16 bits per group, and 16 bits
for each number of embedding, head and norms. Prints a table, then one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import log, log2
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pitlane import Engine, LinearPart, parts_of
from pitlane.models import folder_of
from pitlane.ui.bench.quality import measure

GROUP = 64


@contextmanager
def opened(name: str) -> Iterator[Engine]:
    """An engine with a model, or with the first layers of a model (`NAME:4`)."""
    base, _, layers = name.partition(":")
    with TemporaryDirectory(prefix="pitlane-kbit-") as folder:
        model = base
        if layers:
            from torch import bfloat16

            from pitlane.training.models import read_model, take_layers, write_model

            model = folder
            write_model(
                take_layers(read_model(folder_of(base)), range(int(layers))), folder_of(base), Path(folder), bfloat16
            )
        with Engine(model, plugins={}) as engine:
            yield engine


def points(model: str, text: str, tokens: int, widths: list[int]) -> list[dict[str, Any]]:
    """For every number of bits, and 16: the bits of the model, and the bits per byte of the text."""
    with opened(model) as engine:
        ids = engine.tokenizer.encode(text[: 8 * tokens], add_special_tokens=False)[:tokens]
        num_bytes = len(engine.tokenizer.decode(ids).encode())
        methods = [f"few_bits:bits={bits},group_size={GROUP}" for bits in widths]
        results = measure(engine, ids, methods, 512, lambda done, total: None)
        parts = parts_of(engine.loader.config)
        rounded = sum(part.num_parameters for part in parts if isinstance(part, LinearPart) and part.fed_by)
        kept = engine.loader.num_parameters - rounded
    rows = []
    for bits, result in zip((16, *widths), results, strict=True):
        size = rounded * (bits + (16 / GROUP if bits < 16 else 0)) + 16 * kept
        loss = log(result.perplexity) * result.num_tokens / log(2) / num_bytes
        rows.append({"model": model, "bits": bits, "model_bits": size, "bits_per_byte": loss, "kl": result.kl})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4.5))
    for bits in sorted({row["bits"] for row in rows}):
        line = sorted((row["model_bits"], row["bits_per_byte"]) for row in rows if row["bits"] == bits)
        panel.plot(*zip(*line, strict=True), marker="o", markersize=4, label=f"{bits} bits")
    panel.set_xscale("log")
    panel.set_xlabel("bits of the model")
    panel.set_ylabel("bits per byte of text")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="*", default=["bundled-drafter", "bundled:4", "bundled"])
    parser.add_argument("--skip", type=int, default=30000, help="characters")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--bits", type=int, nargs="*", default=list(range(2, 9)))
    parser.add_argument("--out", type=Path, default=Path("docs/kbit.png"))
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")[options.skip :]
    rows = [row for model in options.models for row in points(model, text, options.tokens, options.bits)]
    print("| model | bits | bits of the model | bits per byte | KL |\n|---|---|---|---|---|")
    for row in rows:
        size = f"{row['model_bits'] / 1e6:,.1f} M (2^{log2(row['model_bits']):.1f})"
        print(f"| {row['model']} | {row['bits']} | {size} | {row['bits_per_byte']:.3f} | {row['kl']:.4f} |")
    draw(rows, options.out)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
