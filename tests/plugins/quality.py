"""How far plugins that round weights move a model: `python -m tests.plugins.quality [MODEL]` prints a table.

The text is the sample PDF of the bundled model (655 tokens with its tokenizer). The exact model runs in float32 over the stored
weights. moved: share of the next token's probability that moves, mean over all tokens. KL: of the exact from the rounded
distribution, mean, in nats. For scale, the first row is the model's default plan in bfloat16, without rounding of weights.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pitlane import BuildContext, Plugin, load_document
from pitlane.engine.models.registry import resolve
from pitlane.engine.text.tokenizer import Tokenizer
from pitlane.plugins.fp8 import Fp8
from pitlane.plugins.int4 import Int4
from pitlane.plugins.int8 import Int8
from pitlane.plugins.packed_linear import PackedLinear
from tests.engine.models.harness import CPU, Harness, load


class Quality(NamedTuple):
    """exact_perplexity: of the model in float32."""

    moved: float
    divergence: float
    perplexity: float
    exact_perplexity: float


class Text:
    """The sample text as tokens of a model, and the logits [T, V] of the exact model."""

    def __init__(self, model: str = "bundled") -> None:
        self.model, self.source = model, resolve(model)
        sample = load_document(str(files("pitlane.storage.bundled") / "sample.pdf"))
        text = "\n".join(page.text for page in sample.pages)
        self.ids = list(Tokenizer(self.source).render_raw(text).token_ids)
        self.exact = Harness(load(model), 1, len(self.ids) + 64).run({0: self.ids}).log_softmax(-1)

    def logits(self, plugin: Plugin | None, dtype: torch.dtype, chunk: int = 4096) -> Tensor:
        """Logits [T, V] of the model with the linears of a plugin; the text comes in chunks."""
        context = BuildContext(self.source.config, dtype, CPU)

        def ask(hook: str, part: Any) -> Any:
            plan = getattr(plugin, hook)(part, context) if hasattr(plugin, hook) else None
            return None if plan is None else (plan, plugin)

        harness = Harness(load(self.model, dtype, ask), 1, len(self.ids) + 64, dtype)
        return torch.cat([harness.run({0: self.ids[i : i + chunk]}) for i in range(0, len(self.ids), chunk)])

    def quality(self, logits: Tensor) -> Quality:
        exact, rounded, targets = self.exact, logits.float().log_softmax(-1), torch.tensor(self.ids[1:])[:, None]
        exact_loss, loss = (float(-table[:-1].gather(1, targets).mean()) for table in (exact, rounded))
        moved = float((exact.exp() - rounded.exp()).abs().sum(-1).mean() / 2)
        divergence = float((exact.exp() * (exact - rounded)).sum(-1).mean())
        return Quality(moved, divergence, float(torch.tensor(loss).exp()), float(torch.tensor(exact_loss).exp()))


def plugins(groups: tuple[int, ...] = (32, 64)) -> dict[str, Plugin | None]:
    """The plugins of the table by label."""
    table: dict[str, Plugin | None] = {"default (bfloat16)": PackedLinear()}
    for inputs in ("int8", "bfloat16"):
        table[f"int8, inputs {inputs}"] = Int8(Int8.parse_options({"activations": inputs}))
    for granularity in ("tensor", "channel", "block"):
        table[f"fp8 by {granularity}"] = Fp8(Fp8.parse_options({"granularity": granularity}))
    for size in groups:
        for symmetric in (False, True):
            for inputs in ("int8", "bfloat16"):
                options = {"group_size": size, "symmetric": symmetric, "activations": inputs}
                label = f"int4 g{size}{' symmetric' if symmetric else ''}, inputs {inputs}"
                table[label] = Int4(Int4.parse_options(options))
    return table


def main(model: str) -> None:
    text = Text(model)
    print(f"{model}, {len(text.ids)} tokens")
    print("| plan | moved | KL | perplexity |\n|---|---|---|---|")
    for label, plugin in plugins().items():
        result = text.quality(text.logits(plugin, torch.bfloat16))
        print(
            f"| {label} | {100 * result.moved:.2f} % | {result.divergence:.5f} | {result.perplexity:.2f} |", flush=True
        )
    print(f"exact perplexity {result.exact_perplexity:.2f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bundled")
