"""Builds the lanes of one model: chooses device and dtype, plans the memory, shares the loaded weights between lanes.

The dtype is chosen once, from the argument, the device and its instruction set. No plugin changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch

from pitlane.engine.calibration.calibrator import ModelCalibrator
from pitlane.engine.calibration.recipe import RecipeProgress
from pitlane.engine.choices import choose_context, choose_device, choose_dtype, is_small
from pitlane.engine.errors import BadOption, PitlaneError
from pitlane.engine.kv.capacity import BLOCK_SIZE, LaneLimits
from pitlane.engine.kv.memory import Needs, available, check_fit, gib
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.decoder import parts_of, residual_dtype
from pitlane.engine.models.mapping import trim_heap
from pitlane.engine.models.recorder import num_parameters
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.source import ModelSource
from pitlane.engine.plan.hooks import HookError, refuse
from pitlane.engine.plan.plan import Plan
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.run.built_model import BuiltModel
from pitlane.engine.run.lane import Call, Lane, Match, Reclaim
from pitlane.engine.text.tokenizer import Tokenizer
from pitlane.engine.variants import Variant, ends_no_text, plan_kv, plan_weights

KV_FORMAT = "1"  # increase it when the meaning of saved KV changes
MAX_LANES = 4  # every lane gets an equal share of KV memory
MAX_SEQS = 64
WARM_UP_OPERATIONS = 5e9
THREADS = torch.get_num_threads()  # torch's own choice, before an engine changes it


class Loader:
    """Knows one model, and builds its lanes. Raises PitlaneError if the model cannot be served.

    Call `share_memory` before the first lane. It sets `needs`, the memory of the default plan, and `kv_share`, the KV bytes
    of a lane.
    """

    needs: Needs
    kv_share: int

    def __init__(
        self,
        model: str,
        dtype: str | None,
        device: str | None,
        threads: int | None,
        context: int | None,
        kv_memory: int | None,
        max_step_tokens: int,
        plugins: PluginRegistry | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise BadOption(f"threads must be >= 1, got {threads}")
        if max_step_tokens < 1:
            raise BadOption(f"max_step_tokens must be >= 1, got {max_step_tokens}")
        self.device = choose_device(device)
        self.plugins = plugins
        self.source = resolve(model, plugins)
        self.config = self.source.config
        self.num_parameters = num_parameters(parts_of(self.config))
        self.dtype = choose_dtype(dtype, self.device, self.config, plugins)
        torch.set_num_threads(threads or (1 if is_small(self.num_parameters) else THREADS))
        self.context = choose_context(context, self.config.max_position)
        self.kv_memory, self.max_step_tokens = kv_memory, max_step_tokens
        self.tokenizer = Tokenizer(self.source)
        self.eos_token_ids = frozenset(self.config.eos_token_ids) | frozenset(self.tokenizer.eos_token_ids)
        self.build_context = BuildContext(
            self.config,
            self.dtype,
            self.device,
            self.source.stored_name,
            self.source.weights.fingerprint,
            self.source.packings,
        )
        self.is_stopped: Callable[[], bool] = lambda: False  # whether the engine is closed: ends the making of a recipe
        self._variants: WeakValueDictionary[tuple[str, ...], Variant] = WeakValueDictionary()
        self._recipe: RecipeProgress | None = None  # the progress of a running build
        self._calibrating = Lock()  # held while recipes are built, which takes minutes; loads of other plans go on
        self._loading = Lock()  # two loads at once would count the same free memory; the engine's thread never takes it

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def way_past_context(self) -> str:
        """The end of a message about the context: names the plugins under which a text has no end, if they serve this model."""
        classes = [entry.plugin for entry in self.plugins or () if entry.plugin and entry.plugin.role == "eviction"]
        context = self.build_context
        serving = [plugin for plugin in classes if not (plugin.unavailable(context) or plugin().refusal(context))]
        names = [plugin.name for plugin in serving if ends_no_text(plugin(), context)]
        return f", or turn on {' or '.join(names)}, which drops the middle of a long text" if names else ""

    @property
    def warm_up_tokens(self) -> int:
        """Tokens of a warm-up forward of about 0.05 s. The engine's thread does nothing else in this time."""
        return max(1, int(WARM_UP_OPERATIONS / (2 * self.num_parameters)))

    def describe(self) -> dict[str, Any]:
        """Return the stats that are the same for every request. weight_bytes: of the default plan."""
        return {
            "model": self.source.name,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_bytes": self.needs.weights,
        }

    def describe_memory(self) -> str:
        """Return a line with the size of the weights of the default plan and the KV tokens of a lane. Contexts are rounded down."""
        contexts = self._block_bytes * 10 // self.needs.kv_bytes(self.context + BLOCK_SIZE) / 10
        return (
            f"{self.source.name} on {self.device}: weights {gib(self.needs.weights)}; KV {gib(self.kv_share)}, "
            f"{gib(self.needs.kv_per_token)} per token, {contexts:.1f} times the context of {self.context:,}"
        )

    def share_memory(self, default: Plan) -> None:
        """Reckon the bytes of the default plan and the KV memory of a lane. Raises ModelTooLarge if they do not fit."""
        self.needs = Needs.of(plan_weights(default, self.build_context), plan_kv(default, self.build_context))
        self.kv_share = kv_share(self.kv_memory, self.needs, self.context, self.device)
        self._check_fit(self.source.name, self.needs, self._lane_bytes, default)

    def make_recipes(self, plan: Plan) -> BuildContext | None:
        """Build the missing recipes of a plan, without the lock of a load. Checks first whether the weights would fit.

        Returns the context that finds the recipes; None if the weights are loaded, or if no plugin makes a recipe.
        """
        return self._make_recipes(plan, self.source, self.build_context, self._lane_bytes)

    def _make_recipes(
        self, plan: Plan, source: ModelSource, context: BuildContext, kv_bytes: int
    ) -> BuildContext | None:
        makers = [plugin for plugin in plan.plugins if type(plugin).prepare is not Plugin.prepare]
        if not makers or self._key(plan, source) in self._variants:
            return None
        checked = replace(context, settings=plan.settings)
        self._check_fit(source.name, Needs.of(plan_weights(plan, checked)), kv_bytes, plan)
        with self._calibrating:
            progress = self._recipe = RecipeProgress(plan.variant_key)
            try:
                return self._prepared(plan, source, context, progress)
            finally:
                self._recipe = None

    def recipe_of(self, plan: Plan) -> RecipeProgress | None:
        """The recipe that is being built for a plan, once its first layer has begun."""
        recipe = self._recipe
        return recipe if recipe is not None and recipe.num_layers and recipe.key == plan.variant_key else None

    def build_lane(
        self, plan: Plan, match: Match, reclaim: Reclaim, call: Call, prepared: BuildContext | None = None
    ) -> Lane:
        """Build the lane of a plan. Loads the weights, or shares loaded weights.

        call: runs a function on the engine's thread. prepared: returned by `make_recipes` for this plan.
        """
        variant = self._variant(plan, self.source, self.build_context, self._lane_bytes, prepared)
        built = variant.for_lane(plan, self.build_context)
        limits = LaneLimits(self.kv_share, self.context, self.max_step_tokens, MAX_SEQS)
        fingerprint, load_drafter = self._fingerprint(plan), partial(self.load_drafter, plan)
        return Lane(
            built, fingerprint, self.dtype, self.device, limits, match, reclaim, load_drafter, call, self.tokenizer
        )

    def load_drafter(self, plan: Plan, name: str) -> BuiltModel:
        """Build a draft model for this model with its dtype and device. Raises BadOption if the tokenizers differ."""
        source = resolve(name, self.plugins)
        tokenizer = Tokenizer(source)
        if tokenizer.fingerprint() != self.tokenizer.fingerprint() or source.config.vocab_size != self.vocab_size:
            raise BadOption(
                f"{name} cannot draft for {self.source.name}: its tokenizer differs; name a model of the same family, "
                "or make one with `pitlane distill`"
            )
        context = BuildContext(
            source.config, self.dtype, self.device, source.stored_name, source.weights.fingerprint, source.packings
        )
        plan, kv_bytes = plan.for_drafter(context), 0  # the lane pays for its KV
        prepared = self._make_recipes(plan, source, context, kv_bytes)
        return self._variant(plan, source, context, kv_bytes, prepared).for_lane(plan, context)

    def _variant(
        self,
        plan: Plan,
        source: ModelSource,
        context: BuildContext,
        kv_bytes: int,
        prepared: BuildContext | None = None,
    ) -> Variant:
        """Return the weights of a model under a plan: loaded weights if there are any, else checked for fit and loaded."""
        key = self._key(plan, source)
        with self._loading:
            variant = self._variants.get(key)
            if variant is None:
                context = prepared or self._prepared(plan, source, context)
                weights = plan_weights(plan, context)
                self._check_fit(source.name, Needs.of(weights), kv_bytes, plan)
                trim_heap()  # of imports and the tokenizer, before the weights need the room
                variant = self._variants[key] = Variant(plan, weights, source, context)
                trim_heap()
            return variant

    def _key(self, plan: Plan, source: ModelSource) -> tuple[str, ...]:
        return (source.weights.fingerprint(), repr(source.config), *plan.variant_key)

    def _prepared(
        self, plan: Plan, source: ModelSource, context: BuildContext, progress: RecipeProgress | None = None
    ) -> BuildContext:
        """Let the plugins that shape the weights make their recipes. Returns the context that finds the recipes."""
        plugins = [plugin for plugin in plan.plugins if plugin.key in plan.variant_key]
        context = replace(context, settings=plan.settings)
        calibrator = ModelCalibrator(source, plan, context, lambda: self.is_stopped(), progress)
        context = replace(context, calibrator=calibrator)
        for plugin in plugins:
            try:
                plugin.prepare(context)
            except PitlaneError:
                raise
            except Exception as error:
                refuse(HookError(plugin, "prepare", error))
        return context

    @property
    def _lane_bytes(self) -> int:
        """KV that a lane must be able to hold: its share, or a full context if that is less."""
        return min(self.kv_share, self.needs.fixed_kv_bytes + self.needs.kv_bytes(self.context + BLOCK_SIZE))

    @property
    def _block_bytes(self) -> int:
        """The part of `kv_share` that a lane of the default plan has for blocks."""
        return self.kv_share - min(self.needs.fixed_kv_bytes, self.kv_share // 4)

    def _check_fit(self, name: str, needs: Needs, kv_bytes: int, plan: Plan) -> None:
        check_fit(name, needs, kv_bytes, self.dtype, self.device, plan.weight_plugins)

    def _fingerprint(self, plan: Plan) -> str:
        """Digest of all inputs of stored KV."""
        parts = [
            KV_FORMAT,
            self.source.weights.fingerprint(),
            _computed_in(self.dtype),
            repr(self.config),
            self.tokenizer.fingerprint(),
            *plan.kv_key,
        ]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(4, "little") + part.encode())
        return digest.hexdigest()


def _computed_in(dtype: torch.dtype) -> str:
    """The dtypes of the weights and, if different, of the residual stream: stored KV depends on both."""
    stream = residual_dtype(dtype)
    return str(dtype) if stream == dtype else f"{dtype}, residuals {stream}"


def kv_share(kv_memory: int | None, needs: Needs, context: int, device: torch.device) -> int:
    """Return the KV bytes of one lane: `kv_memory / MAX_LANES`, at most `MAX_SEQS` full contexts.

    Without `kv_memory`, the lanes share half of the memory that is left beside the weights.
    """
    per_block = BLOCK_SIZE * needs.kv_per_token
    if kv_memory is not None and kv_memory < MAX_LANES * per_block:
        raise BadOption(
            f"--kv-memory {gib(kv_memory)} is less than a block of {BLOCK_SIZE} tokens for each of {MAX_LANES} lanes; "
            f"give at least {gib(MAX_LANES * per_block)}"
        )
    budget = kv_memory
    if budget is None:
        budget = max(MAX_LANES * per_block, (available(device) - needs.weights) // 2)
    return min(budget // MAX_LANES, needs.fixed_kv_bytes + MAX_SEQS * needs.kv_bytes(context + BLOCK_SIZE))
