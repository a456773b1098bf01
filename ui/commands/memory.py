"""`pitlane memory`: what a model needs and what fits, from its config alone.

KV bytes per token = layers x 2 (keys, values) x KV heads x head dim x bytes per value.
"""

from __future__ import annotations

from typing import Any

import click

from pitlane.ui.commands.options import DTYPES, TOKENS, as_json
from pitlane.ui.render import print_json, print_table, size


@click.command()
@click.option(
    "--context", type=TOKENS, metavar="N", help="Tokens per sequence, as 4096 or 32k.  [default: the model's]"
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences at once.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of weights and KV.  [default: by the machine]")
@click.option("--device", metavar="D", help="cpu, cuda or cuda:N.")
@as_json
@click.argument("model", default="bundled", envvar="PITLANE_MODEL")
def memory(context: int | None, batch: int, dtype: str | None, device: str | None, as_json: bool, model: str) -> None:
    """Say what MODEL needs in memory and what fits, without loading its weights."""
    needs = estimate(model, context, batch, dtype, device)
    if as_json:
        print_json(needs)
        return
    shape = needs["shape"]
    formula = (
        f"{shape['layers']} layers x 2 x {shape['kv_heads']} KV heads x {shape['head_dim']} x {shape['bytes']} bytes"
    )
    rows = [
        ["weights", size(needs["weight_bytes"]), f"{needs['parameters'] / 1e6:,.1f} M parameters in {needs['dtype']}"],
        ["KV per token", size(needs["kv_bytes_per_token"]), formula],
        ["KV", size(needs["kv_bytes"]), f"context {needs['context']:,} x batch {batch}"],
        ["work space", size(needs["reserve_bytes"]), "activations and the rest"],
        ["together", size(needs["total_bytes"]), _verdict(needs)],
        ["free", size(needs["free_bytes"]), f"on {needs['device']}"],
        [
            "longest context",
            f"{needs['max_context']:,}",
            f"at batch {batch}; the model was made for {needs['max_position']:,}",
        ],
        ["largest batch", f"{needs['max_batch']:,}", f"at context {needs['context']:,}"],
        [
            "KV by default",
            size(needs["default_kv_bytes"]),
            f"what an engine takes for {needs['default_kv_tokens']:,} tokens",
        ],
        [
            "KV for this",
            f"--kv-memory {-(-needs['kv_memory'] // 10**6)}MB",
            "shared by the sets of plugins that are on at once",
        ],
    ]
    print_table([model, "", ""], rows)


def _verdict(needs: dict[str, Any]) -> str:
    if needs["context"] > needs["max_position"]:
        return f"does not fit: the model was made for a context of at most {needs['max_position']:,}"
    return "fits" if needs["fits"] else "does not fit in the free memory"


def estimate(
    model: str, context: int | None = None, batch: int = 1, dtype: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Bytes that a model takes, and the longest context and largest batch that the free memory and the model allow."""
    from pitlane.engine.kv.memory import RESERVE, Needs, available
    from pitlane.engine.loader import MAX_LANES, choose_context, choose_device, choose_dtype, default_settings, kv_share
    from pitlane.engine.models.registry import resolve
    from pitlane.engine.plan.registry import PluginRegistry
    from pitlane.engine.run.lane import BLOCK_SIZE

    place = choose_device(device)
    config = resolve(model).config
    kind = choose_dtype(dtype, place, config, lambda context: default_settings(PluginRegistry.load(), context))
    tokens = context or choose_context(None, config.max_position)
    needs, free = Needs.of(config, kind), available(place)
    room = max(0, free - needs.weights - RESERVE) // needs.kv_per_token
    is_reached = tokens <= config.max_position
    share = kv_share(None, needs, tokens, place)
    total = needs.weights + needs.kv_per_token * tokens * batch + RESERVE
    return {
        "model": model,
        "device": str(place),
        "dtype": str(kind).removeprefix("torch."),
        "parameters": needs.weights // kind.itemsize,
        "weight_bytes": needs.weights,
        "shape": {
            "layers": config.num_layers,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "bytes": kind.itemsize,
        },
        "kv_bytes_per_token": needs.kv_per_token,
        "context": tokens,
        "batch": batch,
        "kv_bytes": needs.kv_per_token * tokens * batch,
        "reserve_bytes": RESERVE,
        "total_bytes": total,
        "free_bytes": free,
        "fits": total <= free and is_reached,
        "max_position": config.max_position,
        "max_context": min(room // batch, config.max_position),
        "max_batch": room // tokens if is_reached else 0,
        "default_kv_bytes": share,
        "default_kv_tokens": share // needs.kv_per_token,
        "kv_memory": MAX_LANES * needs.kv_per_token * (tokens + BLOCK_SIZE) * batch,
    }
