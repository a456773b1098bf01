"""Sources of weights: a folder of safetensors files, or random numbers in the shapes of a config.

Knows no layer. A source returns tensors as stored; the caller casts and moves them. Nothing here reads a pickle. Files
are memory-mapped: a tensor takes no memory before its first read. `checked` compares the names, shapes and dtypes of a
folder with the parts of the model before any tensor is read, so no later code checks shapes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.config_file import IndexFile, escaped
from pitlane.engine.models.decoder import parts_of
from pitlane.engine.models.mapping import drop_pages, mapping_of
from pitlane.engine.models.parts import NormPart
from pitlane.engine.models.recorder import shapes_in
from pitlane.engine.models.weight_hashes import hashes, state_of

log = logging.getLogger("pitlane")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPUTED = "rotary_emb.inv_freq"  # ignored: old checkpoints store these tensors, but the config determines them
FLOATS = ("F64", "F32", "F16", "BF16")
StoredName: TypeAlias = Callable[[str], str]  # canonical name of a tensor -> its name in the checkpoint
POOL = 20_000_003  # numbers in the pool; prime: a larger tensor repeats the pool, and its rows must differ


class WeightSource(Protocol):
    """Named tensors of one model."""

    def get(self, name: str) -> Tensor:
        """Return one tensor as stored, on the CPU. The caller must not write to it."""

    def fingerprint(self) -> str:
        """Hex digest of all weights. It changes if any weight changes."""


class SafetensorsFolder:
    """Reads the shards listed in the index, else `model.safetensors`, else all `*.safetensors`."""

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        self.files = weight_files(self.folder)
        self.handles = {file: _open(file) for file in self.files}
        self.inodes = [file.stat().st_ino for file in self.files]
        self.mappings: dict[Path, range] = {}  # addresses, of the files with a released tensor
        self.owner: dict[str, Path] = {}
        self.renamed: dict[str, str] = {}  # name that the model uses -> name in the file
        for file, handle in self.handles.items():
            for name in handle.keys():  # noqa: SIM118
                if name in self.owner:
                    raise ModelError(
                        f"{self.folder}: {self.owner[name].name} and {file.name} both hold {escaped(name)}"
                    )
                self.owner[name] = file

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def names(self) -> list[str]:
        return list(self.owner)

    def get(self, name: str) -> Tensor:
        if name not in self.owner:
            raise ModelError(f"{self.folder} lacks {name}; it does not fit its config.json, download it again")
        tensor: Tensor = self.handles[self.owner[name]].get_tensor(self.renamed.get(name, name))
        return tensor

    def release(self, name: str) -> None:
        """Take the pages of one tensor out of this process's memory. The tensor stays valid."""
        self._release(self.owner[name], self.get(name))

    def _release(self, file: Path, tensor: Tensor) -> None:
        if file not in self.mappings:
            self.mappings[file] = mapping_of(file, tensor.data_ptr())
        drop_pages(self.mappings[file], tensor.data_ptr(), tensor.nbytes)

    def rename(self, old: str, new: str) -> None:
        """Serve the tensor `old` under the name `new`."""
        self.owner[new] = self.owner.pop(old)
        self.renamed[new] = old

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype in the spelling of safetensors: F32, BF16, I64, ..."""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        return self.handles[self.owner[name]].get_slice(self.renamed.get(name, name))

    def fingerprint(self) -> str:
        states = {file: state_of(file) for file in self.files}
        for file, inode in zip(self.files, self.inodes, strict=True):
            if file.stat().st_ino != inode:
                raise ModelError(f"{file} was replaced while it was in use; open the model again")
        return hashlib.sha256("".join(hashes(states)).encode()).hexdigest()


class RandomWeights:
    """Random weights in the shapes of a config; the same seed gives the same weights.

    All tensors are slices of one pool of normal numbers. Linears are scaled so that outputs are as large as inputs.
    Norms are 1, less the offset that the model adds.
    """

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        parts = parts_of(config)
        self.shapes = shapes_in(parts)
        self.norms = {f"{part.name}.weight": 1 - part.offset for part in parts if isinstance(part, NormPart)}
        largest = max(torch.Size(shape).numel() for shape in self.shapes.values())
        generator = torch.Generator().manual_seed(seed)
        pool = torch.randn(min(POOL, largest * 5 // 4 + 1), generator=generator).to(self.dtype)
        self.pools = {1: pool}  # input width of a linear -> pool scaled by width**-0.5

    @property
    def num_bytes(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values()) * self.dtype.itemsize

    def names(self) -> list[str]:
        return list(self.shapes)

    def get(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if name in self.norms:
            return torch.full(shape, self.norms[name], dtype=self.dtype)
        width = shape[-1] if len(shape) > 1 else 2500  # biases get a standard deviation of 0.02
        if name == EMBEDDING and not self.config.tie_word_embeddings:
            width = 1  # embedding as large as a layer's output: with a smaller embedding, the text repeats one token
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


def checked(config: DecoderConfig, weights: SafetensorsFolder, stored_name: StoredName = str) -> DecoderConfig:
    """Compare all tensors of a folder with the parts of the model. Raises a ModelError with the tensor's name.

    Returns the config. If config.json ties head and embedding, but the files hold a different head, the returned config
    unties them. transformers 5 does the same. If the files hold the tied
    table only under the name of the head, that tensor is served as the embedding.
    """
    tied, head, embedding = config.tie_word_embeddings, stored_name(HEAD), stored_name(EMBEDDING)
    if tied and head in weights.owner and embedding not in weights.owner:
        weights.rename(head, embedding)
    untied = replace(config, tie_word_embeddings=tied and head not in weights.owner)
    declared = {stored_name(name): shape for name, shape in shapes_in(parts_of(untied)).items()}
    _refuse_any([name for name in declared if name not in weights.owner], weights.folder, "lacks")
    unknown = [name for name in weights.owner if name not in declared and not name.endswith(COMPUTED)]
    _refuse_any(unknown, weights.folder, "holds tensors that its config.json does not declare:")
    for name, shape in declared.items():
        if weights.shape(name) != shape:
            raise ModelError(f"{weights.folder}: {name} must be {shape} by config.json, got {weights.shape(name)}")
        if weights.dtype(name) not in FLOATS:
            raise ModelError(f"{weights.folder}: {name} must be {' or '.join(FLOATS)}, got {weights.dtype(name)}")
    if not tied or head not in weights.owner or _are_equal(weights.get(head), weights.get(embedding)):
        return config
    log.warning("%s: config.json ties head and embedding, but they differ; using the stored head", weights.folder)
    return untied


def _refuse_any(names: list[str], folder: Path, problem: str) -> None:
    if names:
        first = ", ".join(map(escaped, names[:3]))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelError(f"{folder} {problem} {first}{more}; correct config.json, or download the model again")


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model. Raises ModelError if there are none, or a shard is missing."""
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file():
        return _shards(folder, index)
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files and (any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))):
        raise ModelError(f"{folder} holds only pickle weights, which can run code; convert them to safetensors")
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors weights; download the model again")
    return files


def _shards(folder: Path, index: Path) -> list[Path]:
    shards = sorted(set(IndexFile.read(index).weight_map.values()))
    present = {file.name for file in folder.glob("*.safetensors")}
    missing = [shard for shard in shards if shard not in present]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards ({escaped(missing[0])}); download it again"
        )
    if SINGLE in present and SINGLE not in shards:
        raise ModelError(f"{folder} holds {SINGLE} and an index of other files; remove {SINGLE}, or {INDEX}")
    return [folder / shard for shard in shards]


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is truncated or damaged ({escaped(str(error))}); delete it and download it again"
        ) from None
