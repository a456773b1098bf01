"""`pitlane memory`: what a model needs under a plan of plugins and what fits, from its config alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pitlane.ui.commands.options import DTYPES, TOKENS, as_json, offline_option, plugin_options
from pitlane.ui.render import print_json, print_table, size
from pitlane.ui.session import EngineOptions

if TYPE_CHECKING:
    from pitlane.models import MemoryEstimate


@click.command()
@click.option(
    "--context", type=TOKENS, metavar="N", help="Tokens per sequence, as 4096 or 32k.  [default: the model's]"
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences at once.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of weights and KV.  [default: by the machine]")
@click.option("--device", metavar="D", help="cpu, cuda or cuda:N.")
@offline_option
@plugin_options
@as_json
@click.argument("model", default="bundled", envvar="PITLANE_MODEL")
def memory(
    context: int | None, batch: int, dtype: str | None, device: str | None, as_json: bool, model: str, **plugins: Any
) -> None:
    """Say what MODEL needs in memory and what fits, without loading its weights."""
    from pitlane import PluginRegistry
    from pitlane.models import estimate_memory
    from pitlane.ui.commands.model_choice import fetch

    options = EngineOptions(**plugins)
    registry = PluginRegistry.load(options.plugins_dir)
    fetch(model)
    needs = estimate_memory(
        model,
        context,
        batch,
        dtype,
        device,
        plugins=lambda default: options.settings(registry, default).settings,
        registry=registry,
    )
    if as_json:
        print_json(asdict(needs))
        return
    shape = needs.shape
    formula = f"{shape.layers} layers x 2 x {shape.kv_heads} KV heads x {shape.head_dim} x {shape.bytes} bytes"
    if needs.kv_plugins:
        formula = f"by {', '.join(needs.kv_plugins)}; without: {formula}"
    limit = f"at batch {batch}; the model was made for {needs.max_position:,}"
    default = f"what an engine takes for {needs.default_kv_tokens:,} tokens"
    rows = [
        ["weights", size(needs.weight_bytes), _weights(needs)],
        ["KV per token", size(needs.kv_bytes_per_token), formula],
        ["KV", size(needs.kv_bytes), f"context {needs.context:,} x batch {batch}"],
        ["work space", size(needs.reserve_bytes), "activations and the rest"],
        ["together", size(needs.total_bytes), _verdict(needs)],
        ["free", size(needs.free_bytes), f"on {needs.device}"],
        ["longest context", f"{needs.max_context:,}", limit],
        ["largest batch", f"{needs.max_batch:,}", f"at context {needs.context:,}"],
        ["KV by default", size(needs.default_kv_bytes), default],
        [
            "KV for this",
            f"--kv-memory {-(-needs.kv_memory // 10**6)}MB",
            "shared by the sets of plugins that are on at once",
        ],
    ]
    print_table([model, "", ""], rows)


def _weights(needs: MemoryEstimate) -> str:
    made = f", by {', '.join(needs.weight_plugins)}" if needs.weight_plugins else ""
    return f"{needs.parameters / 1e6:,.1f} M parameters in {needs.dtype}{made}"


def _verdict(needs: MemoryEstimate) -> str:
    if needs.context > needs.max_position:
        return f"does not fit: the model was made for a context of at most {needs.max_position:,}"
    return "fits" if needs.fits else "does not fit in the free memory"
