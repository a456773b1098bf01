"""Compiled step: a decode or verify step of up to 64 tokens runs in one C call, and its threads walk it as equals.

Changes in the loop: `build_runner` makes a program of operations from the model (kernels/step.py), and runs it for small batches.
Exactness: identical. The logits have the bits of the model without the plugin, with `flash_attention`, `fused_ops`, and one of
`packed_linear`, `int8` and `int4`: the linears, attention, norms and activations are their C functions, residuals are float32, and
norms of heads and RoPE round as the core does. KV may be quantized by `kv_quant`, and dropped by `attention_sinks` or
`key_norm_eviction`.
All other batches and models run as without the plugin: more than 64 tokens; linears, operations, attention or KV stores of other
plugins; a sequence that goes beyond a block of quantized KV; norms behind attention or MLP. `stats.notes` counts the steps of the
lane by way, and names the reasons.
Costs: memory for the intermediate results of a step, which stays allocated: with contexts up to 512 tokens and without the logits,
0.34 MB per token for SmolLM2-135M, 0.73 MB for llama-1b; a table of angles. Helps small models and busy machines: a step has one
wake-up instead of one per operation, Python's time per operation is gone, and a thread that the operating system has suspended
stops no other thread.
Source: the parallel walk is the project's own (kernels/cpu/step.c)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from pitlane import Plugin, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane import Batch, BuildContext, Decoder, Forward, KVStore, Lane, Output, RunnerContext, Sequence
    from pitlane.kernels.step import Op, Program


MOVING, MAX_MOVING = 2**12, 2**16  # positions whose angles are computed at a time: at least, and half of at most


class CompiledStep(Plugin):
    name, exactness, stage = "compiled_step", "identical", -10  # other plugins wrap it
    is_default = batch_invariant = True

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.steps: WeakSet[Step] = WeakSet()
        self.refused: dict[int, str] = {}  # by the id of the stores of a lane

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        from pitlane.kernels import step
        from pitlane.kernels.extension import unsupported

        return unsupported(context.dtype, context.device) or step.unavailable(context.config.head_dim)

    @hookimpl
    def build_runner(self, forward: Forward, context: RunnerContext) -> Forward | None:
        model, num_layers = _decoder(context)
        reason = _unsupported(forward, context, model)
        if reason is not None:
            self.refused[id(context.stores)] = reason
            return None
        self.refused.pop(id(context.stores), None)
        step = Step(forward, context, model, num_layers)
        self.steps.add(step)
        return step

    @hookimpl
    def sequence_finished(self, seq: Sequence, lane: Lane) -> None:
        counts: Counter[str] = Counter()
        for step in self.steps:
            if step.stores is lane.stores and step.model is lane.built.model:
                counts.update(step.counts)
        reason = None if counts else self.refused.get(id(lane.stores))
        seq.notes[self.name] = {"refused": reason} if reason else dict(counts)


class Step:
    """The forward of one model. counts: its steps with tokens, by the way they ran: `compiled`, or the reason for Python."""

    def __init__(self, forward: Forward, context: RunnerContext, model: Decoder, num_layers: int) -> None:
        from pitlane import Output
        from pitlane.kernels.attention import Parts
        from pitlane.kernels.attention_quant import FIRST_OPEN
        from pitlane.kernels.step import MAX_ROWS

        self.forward, self.stores, self.attention, self.model = forward, context.stores, context.attention, model
        self.max_rows, self.first_open, self.parts_type, self.output = MAX_ROWS, FIRST_OPEN, Parts, Output
        self.build = partial(_program, context, model, num_layers)
        self.program, self.open_slots = self.build(), _open_slots(self.stores)
        self.angles: list[tuple[Tensor, Tensor]] = []
        self.num_angles = 0
        self.moving: list[tuple[Tensor, Tensor]] = []
        self.num_first = self.base = self.num_moving = 0
        self.counts: Counter[str] = Counter()

    def __call__(self, batch: Batch) -> Output:
        num_tokens = batch.num_tokens
        if num_tokens == 0 or batch.operations:
            return self.forward(batch)
        if num_tokens > self.max_rows:
            return self._in_python(batch, f"more than {self.max_rows} tokens")
        if any(getattr(store, "is_closing", False) for store in self.stores):
            return self._in_python(batch, "a sequence goes beyond a block of quantized KV")
        parts = []
        for group in range(len(batch.groups)):
            reads = self.attention.prepare(batch.seen_by(group), group)
            if len(reads) != 1 or not isinstance(reads[0], self.parts_type):
                return self._in_python(batch, "attention in several kernel calls")
            parts.append(reads[0])
        return self._compiled(batch, parts)

    def _compiled(self, batch: Batch, parts: list[Any]) -> Output:
        x = self.model.embedded(batch.token_ids)
        open_slots = _open_slots(self.stores)
        if open_slots != self.open_slots:  # a store of quantized KV has moved its open blocks
            self.program, self.open_slots = self.build(), open_slots
        slots = [
            group.slots if store.format == "dense" else group.slots - self.first_open
            for group, store in zip(batch.groups, self.stores, strict=True)
        ]
        positions, second, angles = self._rotations(batch)
        logits = self.program.run(x, positions, batch.logit_rows, slots, parts, angles, second)
        self.counts["compiled"] += 1
        return self.output(logits, {})

    def _in_python(self, batch: Batch, reason: str) -> Output:
        self.counts[reason] += 1
        return self.forward(batch)

    def _rotations(self, batch: Batch) -> tuple[Tensor, list[Tensor | None], list[tuple[Tensor, Tensor]]]:
        """Tables of angles, and the rows in them of the positions and, per group, of the second queries.

        Without sinks, the tables hold all positions up to the context, and stay. A text with sinks has no end: then the tables hold
        the first positions, where the second queries lie, and `MOVING` positions from `base` on.
        """
        import torch

        second = [group.sink_positions for group in batch.groups]
        positions = batch.positions.numpy()
        low, top = int(positions.min()), int(positions.max())
        if all(place is None for place in second):
            if top >= self.num_angles:
                self.num_angles = max(1024, 2 * top)
                self.angles = self._angles_at(torch.arange(self.num_angles))
            return batch.positions, second, self.angles
        num_first = max(int(place.numpy().max()) for place in second if place is not None) + 1
        if top - low > MAX_MOVING:  # sequences of very different lengths
            own = torch.cat((torch.arange(num_first), batch.positions))
            return torch.arange(num_first, len(own)), second, self._angles_at(own)
        if num_first > self.num_first or low < self.base or top >= self.base + self.num_moving:
            self.num_first, self.base = max(num_first, self.num_first, 1024), low
            self.num_moving = max(MOVING, 2 * (top + 1 - low))
            wanted = torch.cat((torch.arange(self.num_first), torch.arange(low, low + self.num_moving)))
            self.moving = self._angles_at(wanted)
        return batch.positions + (self.num_first - self.base), second, self.moving

    def _angles_at(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per rotary embedding, cos and sin [positions, D / 2], as the decoder computes them."""
        half = self.model.config.head_dim // 2
        tables = [rope.angles(positions) for rope in self.model.ropes]
        return [(cos[:, 0, :half].contiguous(), sin[:, 0, half:].contiguous()) for cos, sin in tables]


def _decoder(context: RunnerContext) -> tuple[Any, int]:
    """The model, and how many of its layers the lane or the draft model runs."""
    from pitlane import EarlyExit

    model: Any = context.model
    if isinstance(model, EarlyExit):
        return model.model, model.num_layers
    return model, getattr(model, "num_layers", 0)


def _unsupported(forward: Forward, context: RunnerContext, model: Any) -> str | None:
    """Why a model cannot run as a program; None if it can."""
    from pitlane import Decoder, DenseKV, ModelForward
    from pitlane.kernels import attention, attention_quant, ops, step

    if type(model) is not Decoder:
        return "the model is not the core's decoder"
    layers, config = model.layers, model.config
    linears = [linear for layer in layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    norms = [norm for layer in layers for norm in (layer.attention_norm, layer.mlp_norm)]
    checks = {
        "another plugin wraps the forward": type(forward) is ModelForward,
        "linears that no kernel in C computes": all(step.has_kernel(linear) for linear in linears),
        "a head that no kernel in C computes": step.has_kernel(model.head),
        "attention other than flash_attention": getattr(context.attention, "attend", None) is attention.attend,
        "operations other than those of fused_ops": model.ops.rms_norm is ops.rms_norm
        and getattr(model.ops, model.op_kinds[1]) is ops.silu_mul
        and not model.ops.has_fused,
        "a KV store other than the core's and kv_quant's": all(
            type(store) is DenseKV or store.format in attention_quant.BITS for store in context.stores
        ),
        "norms behind attention or MLP": not config.output_norms,
        "an intermediate size that is no multiple of 32": config.intermediate_size % 32 == 0,
        "too many KV groups or rotary embeddings": len(context.stores) <= step.MAX_GROUPS
        and len(model.ropes) <= step.MAX_ROPES,
        "norms that are not plain bfloat16": all(norm.is_contiguous() for norm in (*norms, model.norm)),
        "norms of heads with other bits on this machine": not config.qk_norm or step.norms_as_aten(config.head_dim),
    }
    return next((reason for reason, holds in checks.items() if not holds), None)


def _open_slots(stores: list[KVStore]) -> list[int]:
    """The addresses of the open slots of the stores that hold quantized KV."""
    return [store.tensors(0)[1].data_ptr() for store in stores if store.format != "dense"]


def _program(context: RunnerContext, model: Decoder, num_layers: int) -> Program:
    from pitlane.kernels import step

    ops: list[Op] = []
    norms: list[Tensor] = []

    def add(op: Op, **fields: int) -> int:
        ops.append(replace(op, **fields))
        return len(ops) - 1

    def address(norm: Tensor) -> int:
        norms.append(norm)
        return norm.data_ptr()

    x = -1
    for layer in model.layers[:num_layers]:
        kv = {"group": layer.group} | step.kv_fields(context.stores[layer.group], layer.index_in_group)
        queries = add(
            step.linear_op(layer.qkv, step.NORM, step.ROTATED),
            **kv,
            source=x,
            norm=address(layer.attention_norm),
            rope=-1 if layer.rope is None else layer.rope,
            qk_norm=0 if layer.qk_norm is None else address(layer.qk_norm),
        )
        attended = add(step.Op(step.ATTENTION), source=queries, **kv)
        middle = add(step.linear_op(layer.output, step.MERGED, step.SUM), source=attended, residual=x)
        active = add(step.linear_op(layer.gate_up, step.NORM, step.SILU), source=middle, norm=address(layer.mlp_norm))
        x = add(step.linear_op(layer.down, step.ROWS, step.SUM), source=active, residual=middle)
    add(step.linear_op(model.head, step.NORM, step.PLAIN), source=x, norm=address(model.norm), selects=1)
    config = model.config
    shape = step.Shape(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        len(context.stores),
        len(model.ropes),
    )
    owned = model, list(context.stores), norms
    return step.Program(shape, ops, config.rms_norm_eps, config.attention_scale, owned)
