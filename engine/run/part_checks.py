"""Checks of the parts that plugins build for a model: results of build hooks, and whether parts of several plugins fit together.

A part with a fault is refused when a plan is prepared, with the name of its plugin. Without the check, the
fault would show in a request, as an error of the part that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pitlane.engine.border import shown
from pitlane.engine.errors import PitlaneError, PlanConflict
from pitlane.engine.kv.capacity import BLOCK_SIZE
from pitlane.engine.kv.state import KVGroup
from pitlane.engine.kv.store import DenseKV, KVStore, KVStorePlan
from pitlane.engine.kv.visibility import Visibility, checked, checked_eviction, evicts, num_sinks_of
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.decoder import residual_dtype
from pitlane.engine.models.parts import EmbeddingPart, LinearPart, LinearPlan, Part, Tensors
from pitlane.engine.plan.changes import now
from pitlane.engine.plan.hooks import Answer, HookError, refuse
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.plugin import Plugin


def linear_plan(hook: str, _: Plugin, result: object) -> LinearPlan:
    if not isinstance(result, LinearPlan):
        former = f"{hook}(parts)" if callable(result) else ""
        raise TypeError(f"returned {type(result).__name__}, must return a LinearPlan or None{now(former)}")
    return result


def attention_part(_: Plugin, result: object) -> object:
    if not callable(result) or not callable(getattr(result, "prepare", None)):
        former = "Attention.plan" if hasattr(result, "plan") else ""
        raise TypeError(f"returned {type(result).__name__}, which has no methods prepare and __call__{now(former)}")
    return result


def visibility(context: BuildContext, group: KVGroup, _: Plugin, result: Visibility) -> Visibility:
    if evicts(result):
        return checked_eviction(result, group, BLOCK_SIZE, context.config.max_position)
    return checked(result, context.config.max_position)


def operation(kind: str, context: BuildContext, _: Plugin, result: object) -> object:
    if not callable(result):
        raise TypeError(f"returned {result!r}, which is not callable")
    size: dict[str, Any] = {"dtype": context.dtype, "device": context.device}
    config = context.config
    if kind == "rms_norm":
        rows, weight = torch.ones(2, config.hidden_size, **size), torch.ones(config.hidden_size, **size)
        for x in (rows.to(residual_dtype(context.dtype)), rows):
            _try_part(result, (x, weight, config.rms_norm_eps), tuple(x.shape), context)
    elif kind.endswith("_mul"):
        x = torch.ones(2, 2 * config.intermediate_size, **size)
        _try_part(result, (x,), (2, config.intermediate_size), context)
    return result


def _try_part(
    part: Any, inputs: tuple[Any, ...], shape: tuple[int, ...], context: BuildContext, dtype: torch.dtype | None = None
) -> None:
    """Raise TypeError if a part returns another type, shape, dtype or device. In the model, the next part would fail instead.

    dtype: of the result; None: the model's dtype.

    An error inside the part is left to the first forward, which names the plugin too.
    """
    try:
        with torch.inference_mode():
            result = part(*inputs)
    except (Exception, SystemExit):
        return
    if not isinstance(result, torch.Tensor) or tuple(result.shape) != shape:
        got = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else shown(result)
        raise TypeError(f"built a part that returns {got}, not a tensor of shape {shape}")
    dtype = dtype or context.dtype
    if result.dtype != dtype or result.device.type != context.device.type:
        place = f"{dtype} on {context.device}"
        raise TypeError(f"built a part that returns {result.dtype} on {result.device}, not {place}")


def store_plan(_: Plugin, result: object) -> KVStorePlan:
    if not isinstance(result, KVStorePlan):
        raise TypeError(f"returned {type(result).__name__}, not a KVStorePlan")
    return result


def guarded_store(answer: Answer, parts: list[tuple[object, Plugin]]) -> KVStorePlan:
    """Return the plan of a plugin's store. A store that it builds becomes a part; an error becomes PluginFailed."""

    plan: KVStorePlan = answer.value

    def build(num_blocks: int, block_size: int) -> KVStore:
        try:
            store = plan.build(num_blocks, block_size)
        except (Exception, SystemExit) as error:
            refuse(HookError(answer.plugin, "build_kv_store", error))
            raise
        parts.append((store, answer.plugin))
        return store

    return replace(plan, build=build)


def build_guarded(answer: Answer, hook: str, part: Part, context: BuildContext, tensors: list[Tensors]) -> Any:
    """Build a part from a plugin's plan, and try it. An error becomes PluginFailed with the plugin's name."""
    try:
        built = answer.value.build(tensors)
        if not callable(built):
            raise TypeError(f"build returned {built!r}, which is not callable")
        if isinstance(part, EmbeddingPart):
            ids = torch.zeros(2, dtype=torch.int64, device=context.device)
            _try_part(built, (ids,), (2, part.dim), context)
        elif isinstance(part, LinearPart):
            x = torch.zeros(2, part.in_features, dtype=context.dtype, device=context.device)
            _try_part(built, (x,), (2, part.out_features), context)
            if context.dtype.itemsize == 2 and hasattr(built, "wide"):
                _try_part(built.wide, (x,), (2, part.out_features), context, torch.float32)
        return built
    except PitlaneError:
        raise
    except Exception as error:
        return refuse(HookError(answer.plugin, hook, error))


def check_format(attention: Answer | None, store: Answer | None) -> None:
    """Raise PlanConflict if the attention of a plugin cannot read the KV store of a plugin."""
    if attention is None or attention.value.formats is None:
        return
    formats, format_name = attention.value.formats, store.value.format if store else DenseKV.format
    if format_name not in formats:
        reader, writer = attention.plugin.name, store.plugin.name if store else "the core"
        raise PlanConflict(
            f"{reader} reads KV as {' or '.join(formats)}, and {writer} stores it as {format_name}; take {reader}"
            f"{f' or {writer}' if store else ''} out of the plan"
        )


def check_trims(plan: Plan, attention: Answer | None, trims: Sequence[Answer], stores: Sequence[Answer | None]) -> None:
    """Raise PlanConflict if a plugin keeps sinks or evicts blocks, and a part of another plugin cannot work with that."""
    keeper = next((trim.plugin.name for trim in trims if num_sinks_of(trim.value)), None)
    evictor = next((trim.plugin.name for trim in trims if evicts(trim.value)), None)
    writer = next((store.plugin.name for store in stores if store and not _serves_trims(store.value)), None)
    if evictor is not None and writer is not None:
        raise PlanConflict(
            f"the KV store of {writer} does not say that it serves evictions; take {writer} or {evictor} out of the plan"
        )
    if evictor is not None and plan.hook("match_prefix"):
        sharer = plan.hook("match_prefix")[0].plugin.name
        raise PlanConflict(f"{sharer} needs all blocks of a text, and {evictor} drops some; take one of them out")
    if keeper is None:
        return
    if writer is not None:
        raise PlanConflict(
            f"the KV store of {writer} does not say that it serves attention sinks, which {keeper} keeps; take {writer} or "
            f"{keeper} out of the plan"
        )
    if attention is None or getattr(attention.value, "reads_sinks", False):
        return
    reader = attention.plugin.name
    raise PlanConflict(
        f"{reader} cannot read attention sinks, which {keeper} keeps; take {reader} or {keeper} out of the plan"
    )


def _serves_trims(store: KVStorePlan) -> bool:
    return store.serves_trims or store.format == DenseKV.format
