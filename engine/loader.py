"""From the name of a model to lanes: device and dtype, the memory plan, weights built through the hooks of a plan.

The dtype is chosen once, from the device, its instruction set and the size of the model; no plugin changes it.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch

from pitlane.engine.errors import BadOption, PluginFailed
from pitlane.engine.kv.memory import Needs, available, check_fit, gib
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.config import ModelConfig
from pitlane.engine.models.layers import Builder, Linear, LinearPart, Ops
from pitlane.engine.models.llama import Llama
from pitlane.engine.models.registry import ModelSource, build_model, resolve
from pitlane.engine.plan.hooks import Answer, HookError, call
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.run.attention import SpanAttention
from pitlane.engine.run.batch import Attention
from pitlane.engine.run.built_model import BuiltModel
from pitlane.engine.run.lane import BLOCK_SIZE, Call, Lane, LaneLimits, Match, Reclaim
from pitlane.engine.text.tokenizer import Tokenizer

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
KV_FORMAT = "1"  # raised when the meaning of saved KV changes
MAX_LANES = 4  # each gets an equal share of KV memory
MAX_SEQS = 64
SMALL = 64 * 2**20
WARM_UP_OPERATIONS = 5e9
THREADS = torch.get_num_threads()  # torch's own choice, before an engine changes it


class Loader:
    """Knows one model, and builds its lanes. Raises PitlaneError if the model cannot be served."""

    def __init__(
        self,
        model: str,
        dtype: str | None,
        device: str | None,
        threads: int | None,
        context: int | None,
        kv_memory: int | None,
        max_step_tokens: int,
    ) -> None:
        if threads is not None and threads < 1:
            raise BadOption(f"threads must be >= 1, got {threads}")
        if max_step_tokens < 1:
            raise BadOption(f"max_step_tokens must be >= 1, got {max_step_tokens}")
        self.device = choose_device(device)
        self.source = resolve(model)
        self.config = self.source.config
        self.dtype = choose_dtype(dtype, self.device)
        torch.set_num_threads(threads or (1 if is_small(self.config) else THREADS))
        self.context = choose_context(context, self.config.max_position)
        self.needs = Needs.of(self.config, self.dtype)
        self.max_step_tokens = max_step_tokens
        self.kv_share = kv_share(kv_memory, self.needs, self.context, self.device)
        check_fit(self.source.name, self.needs, min(self.kv_share, self._context_bytes), self.dtype, self.device)
        self.tokenizer = Tokenizer(self.source)
        self.eos_token_ids = frozenset(self.config.eos_token_ids) | frozenset(self.tokenizer.eos_token_ids)
        self.build_context = BuildContext(self.config, self.dtype, self.device)
        self._variants: WeakValueDictionary[tuple[str, ...], Variant] = WeakValueDictionary()

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def warm_up_tokens(self) -> int:
        """As many tokens as take about a twentieth of a second; the engine's thread is busy for that time."""
        num_parameters = self.needs.weights // self.dtype.itemsize
        return max(1, int(WARM_UP_OPERATIONS / (2 * num_parameters)))

    @property
    def _context_bytes(self) -> int:
        return (self.context + BLOCK_SIZE) * self.needs.kv_per_token

    def describe(self) -> dict[str, Any]:
        """The part of the stats that is the same for every request."""
        return {
            "model": self.source.name,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_bytes": self.needs.weights,
        }

    def describe_memory(self) -> str:
        """One line: the bytes of the weights, and how many tokens of KV a lane has for requests."""
        tokens = self.kv_share // self.needs.kv_per_token
        return (
            f"{self.source.name} on {self.device}: weights {gib(self.needs.weights)}; KV {gib(self.kv_share)} = {tokens:,} tokens "
            f"of {gib(self.needs.kv_per_token)}, {tokens / self.context:.1f} times the context of {self.context:,}"
        )

    def build_lane(self, plan: Plan, match: Match, reclaim: Reclaim, call: Call) -> Lane:
        """Load or share the weights of the plan's variant, and give them a lane. call: runs a function on the engine's thread."""
        variant = self._variants.get(plan.variant_key)
        if variant is None:
            check_fit(self.source.name, self.needs, min(self.kv_share, self._context_bytes), self.dtype, self.device)
            variant = self._variants[plan.variant_key] = Variant(plan, self.source, self.build_context)
        limits = LaneLimits(self.kv_share, self.context, self.max_step_tokens, MAX_SEQS)
        built = variant.for_lane(plan, self.build_context)
        load_drafter = partial(self.load_drafter, plan)
        return Lane(built, self._fingerprint(plan), self.dtype, self.device, limits, match, reclaim, load_drafter, call)

    def load_drafter(self, plan: Plan, name: str) -> BuiltModel:
        """A draft model for this model, with the same tokenizer, dtype and device, built by the plugins of the plan."""
        source = resolve(name)
        tokenizer = Tokenizer(source)
        if tokenizer.fingerprint() != self.tokenizer.fingerprint() or source.config.vocab_size != self.vocab_size:
            raise BadOption(
                f"{name} cannot draft for {self.source.name}: its tokenizer differs; name a model of the same family, "
                "or make one with `pitlane distill`"
            )
        context = BuildContext(source.config, self.dtype, self.device)
        plan = plan.for_drafter(context)
        return Variant(plan, source, context).for_lane(plan, context)

    def _fingerprint(self, plan: Plan) -> str:
        """Digest of everything that stored KV depends on."""
        parts = [
            KV_FORMAT,
            self.source.weights.fingerprint(),
            str(self.dtype),
            repr(self.config),
            self.tokenizer.fingerprint(),
            *plan.kv_key,
        ]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(4, "little") + part.encode())
        return digest.hexdigest()


class Variant:
    """One set of weights: the model with the linears of a plan, shared by the lanes of the variant."""

    def __init__(self, plan: Plan, source: ModelSource, context: BuildContext) -> None:
        self.parts: list[tuple[object, Plugin]] = []
        self.is_batch_invariant = True

        def build_linear(parts: list[LinearPart]) -> Linear | None:
            answer = _build(plan, "build_linear", parts=parts, context=context)
            if answer is not None:
                self.parts.append((answer.value, answer.plugin))
                self.is_batch_invariant &= answer.plugin.batch_invariant
            elif len(parts) == 1:
                self.is_batch_invariant = False  # the core's product of a row depends on the number of rows
            linear: Linear | None = answer.value if answer is not None else None
            return linear

        with torch.inference_mode():
            builder = Builder(source.config, source.weights, context.dtype, context.device, build_linear)
            self.model: Llama = build_model(source.config, builder)

    def for_lane(self, plan: Plan, context: BuildContext) -> BuiltModel:
        """The model with the operations and the attention of a plan."""
        answers = {each.name: _build(plan, "build_op", kind=each.name, context=context) for each in fields(Ops)}
        ops = Ops(**{name: answer.value for name, answer in answers.items() if answer is not None})
        attention = _build(plan, "build_attention", context=context)
        made = [answer for answer in (*answers.values(), attention) if answer is not None]
        core: Attention = SpanAttention(context.config.attention_scale, context.device)
        return BuiltModel(
            self.model.with_ops(ops),
            attention.value if attention is not None else core,
            self,
            (*self.parts, *((answer.value, answer.plugin) for answer in made)),
            self.is_batch_invariant and len(made) == len(answers) + 1 and all(a.plugin.batch_invariant for a in made),
        )


def _build(plan: Plan, name: str, **values: Any) -> Answer | None:
    return call(plan.hook(name), None, refuse, **values)


def refuse(error: HookError) -> None:
    """A plugin that fails while a plan is prepared: whoever asks for the plan gets the error."""
    raise PluginFailed(f"{error}; take {error.plugin.name} out of the plan") from error


def kv_share(kv_memory: int | None, needs: Needs, context: int, device: torch.device) -> int:
    """KV bytes of one lane: its share of --kv-memory, or of half of the free memory; at most `MAX_SEQS` full contexts."""
    per_block = BLOCK_SIZE * needs.kv_per_token
    if kv_memory is not None and kv_memory < MAX_LANES * per_block:
        raise BadOption(
            f"--kv-memory {gib(kv_memory)} is less than a block of {BLOCK_SIZE} tokens for each of {MAX_LANES} lanes; "
            f"give at least {gib(MAX_LANES * per_block)}"
        )
    budget = kv_memory
    if budget is None:
        budget = max(MAX_LANES * per_block, (available(device) - needs.weights) // 2)
    return min(budget // MAX_LANES, MAX_SEQS * (context + BLOCK_SIZE) * needs.kv_per_token)


def choose_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise BadOption(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadOption(f"device {name!r}: this machine or this torch build has no CUDA; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise BadOption(f"device {name!r} is not served; use cpu, cuda or cuda:N")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named dtype, or bfloat16 if the device multiplies it, else float16 on CUDA and float32 on a CPU."""
    if name is not None:
        if name not in DTYPES:
            raise BadOption(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    has_bfloat16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def is_small(config: ModelConfig) -> bool:
    """Whether the weights fit into the cache: then a second thread costs a token more time than it saves.

    Bundled model, 2 cores, float32: 2.7 ms a token on one thread, 4.9 on two; a prompt of 335 tokens 33 against 24 ms.
    """
    return Needs.of(config, torch.float32).weights < SMALL


def choose_context(asked: int | None, limit: int) -> int:
    """Tokens of context: the number that was asked for, at most that of the model."""
    if asked is None:
        return limit
    if not 1 < asked <= limit:
        raise BadOption(f"context must be in [2, {limit}] for this model, got {asked}")
    return asked
