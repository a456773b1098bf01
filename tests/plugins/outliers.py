"""A model with outlier channels, and SmoothQuant on it: `python -m tests.plugins.outliers` prints a table.

Channels of the norms are scaled up, and the columns of the linears behind them down by as much: the function stays, and the inputs
of the linears get outliers. Large models have outliers of this kind, in the same few channels for all tokens (SmoothQuant, section
3). The scaled channels lie in different groups of 64, so each spoils the rounding of 63 others.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

FACTOR, EVERY = 100.0, 64  # one channel of every 64


def make(folder: Path, factor: float = FACTOR) -> Path:
    """Write the bundled model with outlier channels, in float32."""
    bundled = Path(str(files("pitlane.storage.bundled") / "."))
    folder.mkdir(parents=True, exist_ok=True)
    for file in bundled.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    tensors = {name: tensor.float() for name, tensor in load_file(bundled / "model.safetensors").items()}
    for name, tensor in tensors.items():
        channels = slice(7, None, EVERY)
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[channels] *= factor
        elif name.endswith(tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "gate", "up"))):
            tensor[:, channels] /= factor
    save_file(tensors, folder / "model.safetensors")
    return folder


def compare(engine: Any, tokens: int) -> list[Any]:
    """The qualities of the plain model, int8, int8 with inputs in full precision, and smoothquant, on the sample PDF."""
    from pitlane import load_document
    from pitlane.ui.bench.quality import measure

    pages = load_document(str(files("pitlane.storage.bundled") / "sample.pdf")).pages
    ids = engine.tokenizer.encode("\n".join(page.text for page in pages), add_special_tokens=False)[:tokens]
    methods = ["int8", "int8:activations=bfloat16", "int8+smoothquant:tokens=2048"]
    return measure(engine, ids, methods, 512, lambda done, total: None)


def main() -> None:
    from pitlane import Engine

    with tempfile.TemporaryDirectory() as name:
        for label, model in (("bundled", "bundled"), ("with outliers", str(make(Path(name) / "outliers")))):
            with Engine(model, dtype="float32") as engine:
                for result in compare(engine, 655):
                    print(
                        f"| {label} | {result.method} | {result.perplexity:.2f} | {result.kl:.4f} | {100 * result.top1:.1f} % |"
                    )


if __name__ == "__main__":
    main()
