"""Where weights come from: a folder of safetensors files, or random numbers at a real shape.

Knows no layer. A source hands out tensors as stored; the caller casts and moves them. Nothing here reads a pickle.
Files are memory-mapped, so a tensor costs no memory until it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config import ModelConfig
from pitlane.storage.errors import StorageError
from pitlane.storage.home import home

INDEX = "model.safetensors.index.json"
POOL = 20_000_003  # numbers; prime, so that rows of a tensor that is larger never repeat in step


class WeightSource(Protocol):
    """Named tensors of one model."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""

    def names(self) -> list[str]: ...

    def get(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU, not to be written to."""

    def fingerprint(self) -> str:
        """Hex digest that differs where any weight does."""


class SafetensorsFolder:
    """`model.safetensors`, or the shards that an index names, or all `*.safetensors` where there is no index."""

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        self.files = weight_files(self.folder)
        self.handles = {file: _open(file) for file in self.files}
        self.owner = {name: file for file, handle in self.handles.items() for name in handle.keys()}  # noqa: SIM118

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def names(self) -> list[str]:
        return list(self.owner)

    def get(self, name: str) -> Tensor:
        if name not in self.owner:
            raise ModelError(f"{self.folder} lacks {name}; it does not fit its config.json, download it again")
        tensor: Tensor = self.handles[self.owner[name]].get_tensor(name)
        return tensor

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(_file_hashes(self.files)).encode()).hexdigest()


class RandomWeights:
    """Weights of a config's shape, the same for a seed: linears keep the size of their input, norms are 1.

    All are slices of one pool of normal numbers, drawn once.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.shapes = shapes_of(config)
        largest = max(torch.Size(shape).numel() for shape in self.shapes.values())
        generator = torch.Generator().manual_seed(seed)
        pool = torch.randn(min(POOL, largest * 5 // 4 + 1), generator=generator).to(self.dtype)
        self.pools = {1: pool}  # by the width of the linear that they are scaled for

    @property
    def num_bytes(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values()) * self.dtype.itemsize

    def names(self) -> list[str]:
        return list(self.shapes)

    def get(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self.dtype)
        width = shape[-1] if len(shape) > 1 else 2500  # biases get a standard deviation of 0.02
        if name == "model.embed_tokens.weight" and not self.config.tie_word_embeddings:
            width = 1  # as large as what layers add, so that the text does not settle into one token
        if width not in self.pools:
            self.pools[width] = self.pools[1] * width**-0.5
        pool, size = self.pools[width], torch.Size(shape).numel()
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        if size > len(pool):
            return pool.roll(-place % len(pool)).repeat(size // len(pool) + 1)[:size].view(shape)
        place %= len(pool) - size + 1
        return pool[place : place + size].view(shape)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"random {self.config} {self.seed}".encode()).hexdigest()


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama-like checkpoint: name -> shape."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        linears = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        for name, shape in linears.items():
            shapes |= _linear(f"{at}self_attn.{name}", shape, config.attention_bias)
        shapes |= _linear(f"{at}self_attn.o_proj", (hidden, queries), config.output_bias)
        for name in ("gate_proj", "up_proj"):
            shapes |= _linear(f"{at}mlp.{name}", (inner, hidden), config.mlp_bias)
        shapes |= _linear(f"{at}mlp.down_proj", (hidden, inner), config.mlp_bias)
        shapes |= {f"{at}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        if config.qk_norm:
            shapes |= {f"{at}self_attn.{name}_norm.weight": (dim,) for name in "qk"}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (config.vocab_size, hidden)}


def _linear(name: str, shape: tuple[int, int], bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, or a ModelError that says what is wrong with the folder."""
    index = folder / INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{index} is damaged; download the model again") from None
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {len(missing)} of {len(shards)} shards ({missing[0]}); download it again")
        return [folder / shard for shard in shards]
    files = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
    files = files or sorted(folder.glob("*.safetensors"))
    if not files and (any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))):
        raise ModelError(f"{folder} holds only pickle weights, which can run code; convert them to safetensors")
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors weights; download the model again")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or damaged ({error}); delete it and download it again") from None


def _file_hashes(files: Iterable[Path]) -> list[str]:
    """SHA-256 of each file; known ones come from a cache by path, size and time of change."""
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, StorageError):  # a cache that cannot be read is as good as none
        found = json.loads(_cache().read_text(encoding="utf-8"))
        known = found if isinstance(found, dict) else {}
    hashes, before = [], len(known)
    for file in files:
        state = file.stat()
        key = f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}"
        if key not in known:
            with open(file, "rb") as handle:
                known[key] = _sha256(handle)
        hashes.append(known[key])
    if len(known) > before:
        with suppress(OSError, StorageError):  # one that cannot be written is done without
            _replace(_cache(), json.dumps(known))
    return hashes


def _sha256(handle: Any) -> str:
    digest = hashlib.sha256()
    while chunk := handle.read(1 << 22):
        digest.update(chunk)
    return digest.hexdigest()


def _cache() -> Path:
    return home() / "cache" / "weight_hashes.json"


def _replace(file: Path, text: str) -> None:
    """Write a file in one step, so that no reader sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as handle:
        handle.write(text)
    os.replace(handle.name, file)
