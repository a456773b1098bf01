"""The former face of plugins: names, hooks, arguments and attributes that changed, and what replaces them.

A plugin that was written for the former face fails with the text of `now`, which names the replacement and a heading of
docs/hooks.md. Importing this module imports no torch.
"""

from __future__ import annotations

from typing import NamedTuple

# Version of the face for plugins. A minor version adds names, hooks or arguments; a major version may take names away.
API_VERSION = "1.0"


class Change(NamedTuple):
    """now: the replacement. heading: of the section in docs/hooks.md that describes it."""

    now: str
    heading: str


CHANGES = {  # `pitlane.NAME`, `hook`, `hook(argument)`, `class.attribute`
    "pitlane.SpanAttention": Change(
        "PlainAttention; the plugin span_attention does its work", "build_attention(context)"
    ),
    "pitlane.Query": Change(
        "Batch.query_start, Batch.positions and Batch.parents, tensors", "build_attention(context)"
    ),
    "pitlane.ModelConfig": Change("DecoderConfig", "register_models(registry)"),
    "pitlane.shapes_of": Change("part.shapes", "transform_weights(part, tensors, context)"),
    "engine_closed": Change("Plugin.close(), and close() of the object in lane.state", "The end"),
    "build_linear(parts)": Change(
        "build_linear(part, context), which returns a LinearPlan; part.members are the fused linears",
        "build_linear(part, context)",
    ),
    "match_prefix(pool)": Change("match_prefix(seq, lane), with lane.pool", "match_prefix(seq, lane)"),
    "reclaim_blocks(pool)": Change(
        "reclaim_blocks(lane, num_blocks), with lane.pool", "reclaim_blocks(lane, num_blocks)"
    ),
    "Attention.plan": Change(
        "prepare(batch, group), whose result is the last argument of __call__(q, k, v, store, layer, reads)",
        "build_attention(context)",
    ),
    "LinearPart.tensors": Change("the argument of LinearPlan.build", "build_linear(part, context)"),
    "KVState.operations": Change("lane.pool.queue, with append(Copy(...)) and save(slots, sink)", "Hooks"),
    "Runner.execute": Change("lane.pool.queue, which the next forward carries out, or lane.flush()", "Hooks"),
    "Batch.queries": Change("Batch.query_start, Batch.positions and Batch.parents", "build_attention(context)"),
    "Batch.reads": Change("the last argument of the attention: the result of prepare", "build_attention(context)"),
}


def now(former: str) -> str:
    """Return what replaces a part of the former face. Returns '' for anything else."""
    change = CHANGES.get(former)
    return f"; it is now {change.now}: read '{change.heading}' in docs/hooks.md" if change else ""


def explanation(error: BaseException) -> str:
    """Return advice for an error: the new name of a missing attribute, or how to get a missing module; else ''."""
    if isinstance(error, ImportError):
        return "; install it, or restart Pitlane if the plugin's package was updated or removed meanwhile"
    return now(f"{type(error.obj).__name__}.{error.name}") if isinstance(error, AttributeError) else ""
