"""From a model's name to lanes: device and dtype, the memory plan, weights built through a plan's hooks.

The default plan and dtype come from a table of device and instruction set, not from timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch

from pitlane.engine.errors import BadOption, PluginFailed
from pitlane.engine.kv.memory import Needs, available, check_fit, gib
from pitlane.engine.models.config import ModelConfig
from pitlane.engine.models.layers import Builder, Linear, LinearPart, Ops
from pitlane.engine.models.llama import Llama
from pitlane.engine.models.registry import ModelSource, build_model, resolve
from pitlane.engine.plan.plan import HookError, Plan, Settings
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.run.attention import Attention, SpanAttention
from pitlane.engine.run.lane import BLOCK_SIZE, Call, Lane, LaneLimits, fingerprint
from pitlane.engine.run.scheduler import Match, Reclaim
from pitlane.engine.text.tokenizer import Tokenizer
from pitlane.engine.types import BuildContext

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
KERNELS = ("packed_linear", "paged_attention", "fused_ops")  # with all of them no row's result depends on another row
DEFAULT = ("prefix_cache", *KERNELS)
Wanted: TypeAlias = Callable[[BuildContext], Settings]
MAX_LANES = 4  # each gets an equal share of KV memory
MAX_SEQS = 64
SMALL = 64 * 2**20
WARM_UP_OPERATIONS = 5e9
THREADS = torch.get_num_threads()  # torch's own choice; an engine before this one may have changed it


class Loader:
    """Knows one model, and builds its lanes. wanted: the settings of the default plan, once the dtype is chosen."""

    def __init__(
        self,
        model: str,
        dtype: str | None,
        device: str | None,
        threads: int | None,
        context: int | None,
        kv_memory: int | None,
        max_step_tokens: int,
        wanted: Wanted,
    ) -> None:
        if threads is not None and threads < 1:
            raise BadOption(f"threads must be >= 1, got {threads}")
        if max_step_tokens < 1:
            raise BadOption(f"max_step_tokens must be >= 1, got {max_step_tokens}")
        self.device = choose_device(device)
        self.source = resolve(model)
        self.config = self.source.config
        self.dtype = choose_dtype(dtype, self.device, self.config, wanted)
        torch.set_num_threads(threads or (1 if is_small(self.config) else THREADS))
        self.context = choose_context(context, self.config.max_position)
        self.needs = Needs.of(self.config, self.dtype)
        self.max_step_tokens = max_step_tokens
        self.kv_share = kv_share(kv_memory, self.needs, self.context, self.device)
        check_fit(self.source.name, self.needs, min(self.kv_share, self._context_bytes), self.dtype, self.device)
        self.tokenizer = Tokenizer(self.source)
        self.eos_token_ids = frozenset(self.config.eos_token_ids) | frozenset(self.tokenizer.eos_token_ids)
        self.build_context = BuildContext(self.config, self.dtype, self.device)
        self._variants: WeakValueDictionary[tuple[str, ...], Any] = WeakValueDictionary()

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def warm_up_tokens(self) -> int:
        """As many as take about a twentieth of a second; the engine's thread is busy with them."""
        num_parameters = self.needs.weights // self.dtype.itemsize
        return max(1, int(WARM_UP_OPERATIONS / (2 * num_parameters)))

    @property
    def _context_bytes(self) -> int:
        return (self.context + BLOCK_SIZE) * self.needs.kv_per_token

    def describe(self) -> dict[str, Any]:
        """What stats say of the model."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "model": self.source.name,
            "device": str(self.device),
            "dtype": dtype,
            "weight_bytes": self.needs.weights,
        }

    def describe_memory(self) -> str:
        """One line: what the weights take, and how much KV a lane has for requests."""
        tokens = self.kv_share // self.needs.kv_per_token
        return (
            f"{self.source.name} on {self.device}: weights {gib(self.needs.weights)}; KV {gib(self.kv_share)} = {tokens:,} tokens "
            f"of {gib(self.needs.kv_per_token)}, {tokens / self.context:.1f} times the context of {self.context:,}"
        )

    def build_lane(self, plan: Plan, match: Match, reclaim: Reclaim, call: Call) -> Lane:
        """Load (or share) the plan's variant and give it a lane. call: has the engine's thread do something."""
        model = self._variants.get(plan.variant_key)
        if model is None:
            check_fit(self.source.name, self.needs, min(self.kv_share, self._context_bytes), self.dtype, self.device)
            model = self._variants[plan.variant_key] = _built(plan, self.source, self.build_context)
        limits = LaneLimits(self.kv_share, self.context, self.max_step_tokens, MAX_SEQS)
        digest = fingerprint(
            self.source.weights.fingerprint(),
            str(self.dtype),
            repr(self.config),
            self.tokenizer.fingerprint(),
            *plan.kv_key,
        )
        lane = Lane(
            model.with_ops(_ops(plan, self.build_context)),
            digest,
            _attention(plan, self.build_context),
            self.dtype,
            self.device,
            limits,
            match,
            reclaim,
        )
        lane.variant, lane.call = model, call
        lane.load_drafter = partial(self.load_drafter, plan)
        return lane

    def load_drafter(self, plan: Plan, name: str) -> tuple[Llama, Attention]:
        """A model that drafts for this one, and its attention: of the same tokenizer, dtype and device, by the plan's kernels."""
        source = resolve(name)
        tokenizer = Tokenizer(source)
        if tokenizer.fingerprint() != self.tokenizer.fingerprint() or source.config.vocab_size != self.vocab_size:
            raise BadOption(
                f"{name} cannot draft for {self.source.name}: its tokenizer differs; name a model of the same family, "
                "or make one with `pitlane distill`"
            )
        context = BuildContext(source.config, self.dtype, self.device)
        plan = plan.for_drafter(context)
        return _built(plan, source, context).with_ops(_ops(plan, context)), _attention(plan, context)

    def make_room(self, lanes: dict[tuple[str, ...], Lane]) -> None:
        """Before one more lane: drop the least used idle one if there are as many as share the memory."""
        if len(lanes) < MAX_LANES:
            return
        idle = {key: lane for key, lane in list(lanes.items()) if not lane.has_work}
        if not idle:
            raise BadOption(f"{MAX_LANES} ways to run the model are busy; wait for an answer, or toggle fewer plugins")
        del lanes[min(idle, key=lambda key: idle[key].busy_seconds)]


def _built(plan: Plan, source: ModelSource, context: BuildContext) -> Llama:
    """A model with the linears of a plan."""

    def build_linear(parts: list[LinearPart]) -> Linear | None:
        built: Linear | None = _first(plan, "build_linear", parts=parts, context=context)
        return built

    with torch.inference_mode():
        builder = Builder(source.config, source.weights, context.dtype, context.device, build_linear)
        return build_model(source.config, builder)


def _ops(plan: Plan, context: BuildContext) -> Ops:
    found = {each.name: _first(plan, "build_op", kind=each.name, context=context) for each in fields(Ops)}
    return Ops(**{name: op for name, op in found.items() if op is not None})


def _attention(plan: Plan, context: BuildContext) -> Attention:
    found: Attention | None = _first(plan, "build_attention", context=context)
    return found or SpanAttention(context.config.attention_scale, context.device)


def _first(plan: Plan, hook: str, **values: Any) -> Any:
    try:
        return plan.first(hook, lambda *_: None, **values)
    except HookError as error:
        raise PluginFailed(f"{error}; take {error.plugin.name} out of the plan") from error


def kv_share(kv_memory: int | None, needs: Needs, context: int, device: torch.device) -> int:
    """KV bytes of one lane: its share of --kv-memory, or of half of what is free; at most what `MAX_SEQS` full contexts need."""
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


def choose_dtype(name: str | None, device: torch.device, config: ModelConfig, wanted: Wanted) -> torch.dtype:
    """The named dtype, or bfloat16 where the hardware multiplies it, else float32.

    On a CPU, small models (`is_small`) stay in float32 unless all `KERNELS` are wanted and can serve them: without, bfloat16 is no
    faster in cache, and a draft or a batch tips ties that people see. Bundled model, one thread: 5.3 to 6.2 ms a token and 145 ms
    for 704 tokens of prompt in float32, 1.7 to 2.4 and 70 by the kernels.
    """
    if name is not None:
        if name not in DTYPES:
            raise BadOption(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    is_served = set(KERNELS) <= set(wanted(BuildContext(config, torch.bfloat16, device)))
    return torch.bfloat16 if is_served or not is_small(config) else torch.float32


def is_small(config: ModelConfig) -> bool:
    """Whether the weights lie in cache, where a second thread costs a token more than it brings.

    Bundled model, 2 cores, float32: 2.7 ms a token on one thread, 4.9 on two; a prompt of 335 tokens 33 against 24 ms.
    """
    return Needs.of(config, torch.float32).weights < SMALL


def default_settings(registry: PluginRegistry, context: BuildContext | None = None) -> Settings:
    """Plugins that are on when nothing is asked for: those of `DEFAULT` that can serve the model, where it is known."""
    return {name: {} for name in DEFAULT if context is None or registry.get(name).unavailable(context) is None}


def choose_context(asked: int | None, most: int) -> int:
    """Tokens of context: as asked, at most what the model was made for."""
    if asked is None:
        return most
    if not 1 < asked <= most:
        raise BadOption(f"context must be in [2, {most}] for this model, got {asked}")
    return asked
