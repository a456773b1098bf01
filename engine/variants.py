"""Variants: the weights of a model as the plugins of a plan build them. Lanes of equal weights share a variant.

`plan_weights` asks the plugins for every part and reads no tensor; `Variant` then reads the tensors and builds the model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pitlane.engine.kv.capacity import GroupNeeds
from pitlane.engine.kv.state import KVGroup
from pitlane.engine.kv.store import KVStorePlan, dense_plan
from pitlane.engine.kv.visibility import num_sinks_of, visibility_of
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.builder import Builder, Transform
from pitlane.engine.models.decoder import Decoder, parts_of
from pitlane.engine.models.layers import Ops
from pitlane.engine.models.parts import LinearPlan, Part, Tensors
from pitlane.engine.models.source import ModelSource
from pitlane.engine.models.weight_plan import WeightPlan
from pitlane.engine.plan.hooks import Answer, Check, Hook, call, refuse
from pitlane.engine.plan.hookspecs import SPECS
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.run.attention import PlainAttention
from pitlane.engine.run.batch import Attention
from pitlane.engine.run.built_model import BuiltModel
from pitlane.engine.run.part_checks import (
    attention_part,
    build_guarded,
    check_format,
    check_trims,
    guarded_store,
    linear_plan,
    operation,
    store_plan,
    visibility,
)

SAMPLE = "sample"  # the operation that draws tokens; no part of a model


def plan_weights(plan: Plan, context: BuildContext) -> WeightPlan:
    """Return what every part of a model becomes under a plan. Reads no tensor."""
    context = replace(context, settings=plan.settings)

    def ask(hook: str, part: Part) -> tuple[LinearPlan, Plugin] | None:
        answer = call(plan.hook(hook), None, refuse, partial(linear_plan, hook), part=part, context=context)
        if answer is None:
            return None
        return replace(answer.value, build=partial(build_guarded, answer, hook, part, context)), answer.plugin

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
            kind: _build(plan, "build_op", partial(operation, kind, context), kind=kind, context=context)
            for kind in (*self.model.op_kinds, *self.model.fused_kinds, SAMPLE)
        }
        norm, fused = answers["rms_norm"], answers["add_rms_norm"]
        if fused is not None and (norm is None or norm.plugin is not fused.plugin):
            answers["add_rms_norm"] = None  # the norm of another plugin must not be passed over
        given = {kind: answer.value for kind, answer in answers.items() if answer is not None and kind != SAMPLE}
        ops = Ops(**given)
        attention = _build(plan, "build_attention", attention_part, context=context)
        built = [answer for answer in (*answers.values(), attention) if answer is not None]
        core: Attention = PlainAttention(context)
        kv = _kv_answers(plan, context)
        for _, store, _ in kv:
            check_format(attention, store)
        trims = [trim for _, _, trim in kv if trim is not None]
        check_trims(plan, attention, trims, [store for _, store, _ in kv])
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
                guarded_store(store, parts) if store else _store_or_core(group, None, context) for group, store, _ in kv
            ),
            answers[SAMPLE],
        )


def _kv_answers(plan: Plan, context: BuildContext) -> list[tuple[KVGroup, Answer | None, Answer | None]]:
    """Per KV group: the store and the visibility that plugins plan."""
    return [
        (
            group,
            _build(plan, "build_kv_store", store_plan, group=group, context=context),
            _build(plan, "trim_cache", partial(visibility, context, group), group=group, context=context),
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
