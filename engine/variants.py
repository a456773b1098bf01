"""Variants: the weights of a model as the plugins of a plan build them. Lanes of equal weights share a variant.

`plan_weights` asks the plugins for every part and reads no tensor; `Variant` then reads the tensors and builds the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pitlane.engine.border import shown
from pitlane.engine.errors import PitlaneError, PlanConflict
from pitlane.engine.kv.capacity import BLOCK_SIZE, GroupNeeds
from pitlane.engine.kv.state import KVGroup
from pitlane.engine.kv.store import DenseKV, KVStore, KVStorePlan, dense_plan
from pitlane.engine.kv.visibility import (
    Visibility,
    checked,
    checked_eviction,
    evicts,
    num_sinks_of,
    visibility_of,
)
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.builder import Builder, Transform
from pitlane.engine.models.decoder import Decoder, parts_of, residual_dtype
from pitlane.engine.models.layers import Ops
from pitlane.engine.models.parts import EmbeddingPart, LinearPart, LinearPlan, Part, Tensors
from pitlane.engine.models.source import ModelSource
from pitlane.engine.models.weight_plan import WeightPlan
from pitlane.engine.plan.changes import now
from pitlane.engine.plan.hooks import Answer, Check, Hook, HookError, call, refuse
from pitlane.engine.plan.hookspecs import SPECS
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.run.attention import PlainAttention
from pitlane.engine.run.batch import Attention
from pitlane.engine.run.built_model import BuiltModel

SAMPLE = "sample"  # the operation that draws tokens; no part of a model


def plan_weights(plan: Plan, context: BuildContext) -> WeightPlan:
    """Return what every part of a model becomes under a plan. Reads no tensor."""
    context = replace(context, settings=plan.settings)

    def ask(hook: str, part: Part) -> tuple[LinearPlan, Plugin] | None:
        answer = call(plan.hook(hook), None, refuse, partial(_linear_plan, hook), part=part, context=context)
        if answer is None:
            return None
        return replace(answer.value, build=partial(_build_guarded, answer, hook, part, context)), answer.plugin

    context = _with_weights_of(plan, context)
    return WeightPlan.of(parts_of(context.config), context, ask, bool(plan.hook("transform_weights")))


def _with_weights_of(plan: Plan, context: BuildContext) -> BuildContext:
    """The context of the weights under a plan: weights that a plugin changes are dense, and their fingerprint is unknown."""
    return replace(context, packings={}, fingerprint=str) if plan.hook("transform_weights") else context


def plan_kv(plan: Plan, context: BuildContext) -> list[GroupNeeds]:
    """Return the memory of the KV stores of a model under a plan, per KV group. Takes no memory."""
    return [
        GroupNeeds.of(_store_or_core(group, store, context), visibility_of(group, trim.value if trim else None))
        for group, store, trim in _kv_answers(plan, context)
    ]


def ends_no_text(plugin: Plugin, context: BuildContext) -> bool:
    """Whether texts may grow without end under a plugin alone: all groups drop blocks, and sinks keep the distances small.

    A plugin that fails ends every text.
    """
    hooks = (Hook.of(plugin, SPECS["trim_cache"]),)
    answers = [
        call(hooks, None, lambda error: None, group=group, context=context) for group in context.config.kv_groups
    ]
    pairs = zip(context.config.kv_groups, answers, strict=True)
    visibilities = [visibility_of(group, answer.value if answer else None) for group, answer in pairs]
    return any(map(num_sinks_of, visibilities)) and all(v.max_tokens is not None for v in visibilities)


class Variant:
    """One set of weight tensors in memory, and the model over it."""

    def __init__(self, plan: Plan, weights: WeightPlan, source: ModelSource, context: BuildContext) -> None:
        transform = transform_of(plan, context)
        with torch.inference_mode():
            builder = Builder(weights, source.weights, context.dtype, context.device, transform, source.stored_name)
            self.model = Decoder(source.config, builder)
        self.parts: list[tuple[object, Plugin]] = builder.built
        self.num_bytes = weights.num_bytes
        self.is_batch_invariant = weights.is_batch_invariant

    def for_lane(self, plan: Plan, context: BuildContext) -> BuiltModel:
        """Return the model with the operations and the attention that the plugins of a plan built."""
        context = _with_weights_of(plan, context)
        answers = {
            kind: _build(plan, "build_op", partial(_operation, kind, context), kind=kind, context=context)
            for kind in (*self.model.op_kinds, *self.model.fused_kinds, SAMPLE)
        }
        norm, fused = answers["rms_norm"], answers["add_rms_norm"]
        if fused is not None and (norm is None or norm.plugin is not fused.plugin):
            answers["add_rms_norm"] = None  # the norm of another plugin must not be passed over
        given = {kind: answer.value for kind, answer in answers.items() if answer is not None and kind != SAMPLE}
        ops = Ops(**given)
        attention = _build(plan, "build_attention", _attention, context=context)
        built = [answer for answer in (*answers.values(), attention) if answer is not None]
        core: Attention = PlainAttention(context)
        kv = _kv_answers(plan, context)
        for _, store, _ in kv:
            _check_format(attention, store)
        trims = [trim for _, _, trim in kv if trim is not None]
        _check_trims(plan, attention, trims, [store for _, store, _ in kv])
        visibilities = tuple(visibility_of(group, trim.value if trim else None) for group, _, trim in kv)
        chosen: Attention = attention.value if attention is not None else core
        parts = [*self.parts, *((answer.value, answer.plugin) for answer in (*built, *trims))]
        return BuiltModel(
            self.model.with_ops(ops),
            chosen,
            self,
            context,
            parts,
            self.is_batch_invariant
            and context.device.type == "cpu"  # tiles on a GPU depend on the batch
            and attention is not None
            and all(answers[kind] is not None for kind in self.model.op_kinds)
            and all(a.plugin.batch_invariant for a in built),
            plan.hook("build_runner"),
            visibilities,
            tuple(
                _guarded_store(store, parts) if store else _store_or_core(group, None, context)
                for group, store, _ in kv
            ),
            answers[SAMPLE],
        )


def _kv_answers(plan: Plan, context: BuildContext) -> list[tuple[KVGroup, Answer | None, Answer | None]]:
    """Per KV group: the store and the visibility that plugins plan."""
    return [
        (
            group,
            _build(plan, "build_kv_store", _store_plan, group=group, context=context),
            _build(plan, "trim_cache", partial(_visibility, context, group), group=group, context=context),
        )
        for group in context.config.kv_groups
    ]


def _store_or_core(group: KVGroup, store: Answer | None, context: BuildContext) -> KVStorePlan:
    if store is None:
        return dense_plan(group, context.dtype, context.device)
    plan: KVStorePlan = store.value
    return plan


def _build(plan: Plan, name: str, check: Check, **values: Any) -> Answer | None:
    return call(plan.hook(name), None, refuse, check, **values)


def _linear_plan(hook: str, _: Plugin, result: object) -> LinearPlan:
    if not isinstance(result, LinearPlan):
        former = f"{hook}(parts)" if callable(result) else ""
        raise TypeError(f"returned {type(result).__name__}, must return a LinearPlan or None{now(former)}")
    return result


def _attention(_: Plugin, result: object) -> object:
    if not callable(result) or not callable(getattr(result, "prepare", None)):
        former = "Attention.plan" if hasattr(result, "plan") else ""
        raise TypeError(f"returned {type(result).__name__}, which has no methods prepare and __call__{now(former)}")
    return result


def _visibility(context: BuildContext, group: KVGroup, _: Plugin, result: Visibility) -> Visibility:
    if evicts(result):
        return checked_eviction(result, group, BLOCK_SIZE, context.config.max_position)
    return checked(result, context.config.max_position)


def _operation(kind: str, context: BuildContext, _: Plugin, result: object) -> object:
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


def _try_part(part: Any, inputs: tuple[Any, ...], shape: tuple[int, ...], context: BuildContext) -> None:
    """Raise TypeError if a part returns another type, shape, dtype or device. In the model, the next part would fail instead.

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
    if result.dtype != context.dtype or result.device.type != context.device.type:
        place = f"{context.dtype} on {context.device}"
        raise TypeError(f"built a part that returns {result.dtype} on {result.device}, not {place}")


def _store_plan(_: Plugin, result: object) -> KVStorePlan:
    if not isinstance(result, KVStorePlan):
        raise TypeError(f"returned {type(result).__name__}, not a KVStorePlan")
    return result


def _guarded_store(answer: Answer, parts: list[tuple[object, Plugin]]) -> KVStorePlan:
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


def _build_guarded(answer: Answer, hook: str, part: Part, context: BuildContext, tensors: list[Tensors]) -> Any:
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
        return built
    except PitlaneError:
        raise
    except Exception as error:
        return refuse(HookError(answer.plugin, hook, error))


def transform_of(plan: Plan, context: BuildContext) -> Transform | None:
    """The function that passes the tensors of a part through the plugins of a plan; None if no plugin changes any."""
    context = replace(context, settings=plan.settings | dict(context.settings))
    return partial(_transform, plan, context) if plan.hook("transform_weights") else None


def _transform(plan: Plan, context: BuildContext, part: Part, tensors: Tensors) -> Tensors:
    """Pass the tensors of one part of the checkpoint through the plugins. Names and shapes must stay."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def check(_: Plugin, result: Any) -> Any:
        made = shapes if result is None else {name: tuple(tensor.shape) for name, tensor in result.items()}
        if made != shapes:
            raise ValueError(f"made {made} of {shapes} in {part.name}; names and shapes must stay")
        return result

    hooks = plan.hook("transform_weights")
    answer = call(hooks, None, refuse, check, part=part, tensors=tensors, context=context)
    return tensors if answer is None else answer.value


def _check_format(attention: Answer | None, store: Answer | None) -> None:
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


def _check_trims(
    plan: Plan, attention: Answer | None, trims: Sequence[Answer], stores: Sequence[Answer | None]
) -> None:
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
