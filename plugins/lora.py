"""LoRA: the weights of an adapter added to the model; a shipped adapter, or a folder of PEFT or of `pitlane train --lora`.

Changes in the loop: `transform_weights` adds scale * B @ A to the linears that the adapter names, in float32, and rounds the sum to
the stored dtype. Plugins that prune, round or pack weights get the sum: stage -10 is before them all.
Exactness: steering. Answers are those of the tuned model. With `lora.scale=0` they are those of the model itself.
Costs: time at load, and the memory of one more variant; a step takes no longer. A model with and without an adapter are two
variants, so both can serve at once. Their KV is never shared. Two contents of one folder are two adapters.
The shipped adapter `documents` was made for SmolLM2 (`--model smollm2`). It is on by default for questions about a document.
Refused, with the reason: an adapter for another model, DoRA, adapters with more than low-rank weights of linears.
Paper: Hu et al. 2021, https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import json
import re
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pitlane import BadOption, LinearPart, Plugin, PluginOptions, file_hash, hookimpl
from pitlane.storage.adapters import DOCUMENTS, SHIPPED

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane import BuildContext, Part, Tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
FLOATS = ("F64", "F32", "F16", "BF16")
UNSUPPORTED = {  # keys of adapter_config.json that must be empty
    "modules_to_save": "the adapter replaces whole modules",
    "use_dora": "DoRA scales the columns of a weight",
    "fan_in_fan_out": "the weights are transposed",
    "lora_bias": "the adapter has biases",
    "layer_replication": "the adapter repeats layers",
    "trainable_token_indices": "the adapter changes the embedding",
    "target_parameters": "the adapter changes parameters that are no linears",
    "alora_invocation_tokens": "an activated adapter serves only a part of the tokens",
    "use_qalora": "QALoRA pools the inputs of a linear",
    "use_bdlora": "the weights of the adapter are block-diagonal",
    "arrow_config": "a router chooses among adapters",
    "kasa_config": "KaSA changes the weights of the model",
    "monteclora_config": "the weights of the adapter are random",
}
KEEP_MODEL = (
    None,
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # starts (`init_lora_weights`) that keep the model's weights


class Lora(Plugin):
    name, exactness, stage = "lora", "steering", -10

    class Options(PluginOptions):
        adapter: str = Field(
            DOCUMENTS,
            title="Adapter",
            description=f"name of a shipped adapter ({', '.join(SHIPPED)}), or folder of a PEFT adapter: {CONFIG} and "
            f"{WEIGHTS}; ./{DOCUMENTS} is always a folder",
        )
        scale: float = Field(
            1.0, ge=0, le=10, title="Scale", description="factor of the adapter's own scale; 0 changes no weight"
        )

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self.folder = _folder(self.options)
        self.state = self._state()
        self.config = _read_config(self.folder)
        self.file, self.pairs = _open(self.folder)
        self.scales = {module: self.options.scale * self._scale(module, pair) for module, pair in self.pairs.items()}

    @classmethod
    def key_of(cls, options: PluginOptions) -> str:
        """The key of an instance, with a hash of the adapter: another content of the folder makes another variant."""
        return "".join([super().key_of(options), *(file_hash(file) for file in _files(_folder(options)))])

    @classmethod
    def is_default_for_documents(cls, context: BuildContext) -> bool:
        """Whether the shipped adapter for documents was made for these weights, and its files are in this installation."""
        adapter = SHIPPED[DOCUMENTS]
        is_here = all(file.is_file() for file in _files(adapter.folder))
        return is_here and context.fingerprint() in adapter.fingerprints

    def refusal(self, context: BuildContext) -> str | None:
        """Compare the adapter with the linears of a model. Returns the first difference."""
        difference = self._difference(context)
        if difference is None:
            return None
        shipped = SHIPPED.get(self.options.adapter)
        base = shipped.base if shipped else self.config.base
        made_for = f" (made for {base!r})" if base else ""
        if shipped is None:
            return f"the adapter {self.folder}{made_for} {difference}"
        way_out = "set lora.adapter to the folder of an adapter for this model"
        return f"the shipped adapter {self.options.adapter}{made_for} {difference}; {way_out}"

    def _difference(self, context: BuildContext) -> str | None:
        """The first linear of the adapter that the model lacks, or has in another shape."""
        from pitlane import parts_of

        parts = [part for part in parts_of(context.config) if isinstance(part, LinearPart)]
        linears = {
            context.stored_name(member.name): (part, [member.out_features, part.in_features])
            for part in parts
            for member in part.members
        }
        for module, pair in self.pairs.items():
            if module not in linears:
                return f"changes {module}, and the model has no linear of this name"
            part, shape = linears[module]
            if part.tied_to is not None:
                return f"changes {module}, which is the table of the embedding in this model"
            if shape != pair.shape:
                return f"changes {module} of the shape {pair.shape}, in this model the shape is {shape}"
        return None

    @hookimpl
    def transform_weights(self, part: Part, tensors: Tensors, context: BuildContext) -> Tensors | None:
        module = context.stored_name(part.name)
        if module not in self.pairs:
            return None
        merged = self._merged(module, tensors["weight"])
        if self._state() != self.state:
            raise BadOption(f"the adapter {self.folder} changed while it was read; send the request again")
        return {**tensors, "weight": merged}

    def _merged(self, module: str, weight: Tensor) -> Tensor:
        """W + scale * B @ A, computed in float32 or wider."""
        import torch

        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = (self.file.get_tensor(name).to(dtype) for name in self.pairs[module].names)
        merged = torch.addmm(weight.to(dtype), b, a, alpha=self.scales[module]).to(weight.dtype)
        if not bool(merged.isfinite().all()):
            raise BadOption(
                f"{module} with the adapter {self.folder} is not finite in {weight.dtype}; lower lora.scale "
                f"({self.options.scale:g}), or choose another adapter"
            )
        return merged

    def _scale(self, module: str, pair: Pair) -> float:
        """The adapter's own scale of a module: alpha / r, or with rsLoRA alpha / sqrt(r)."""
        config = self.config
        rank = _matching(config.rank_pattern, module, config.r)
        if rank != pair.rank:
            raise BadOption(f"{self.folder}: {module} has rank {pair.rank}, and {CONFIG} says {rank}; {RESTORE}")
        alpha: float = _matching(config.alpha_pattern, module, config.lora_alpha)
        return alpha / (sqrt(rank) if config.use_rslora else rank)

    def _state(self) -> list[tuple[int, ...]]:
        """Numbers that change when a file of the adapter is written or replaced."""
        try:
            stats = [file.stat() for file in _files(self.folder)]
        except OSError as error:
            raise _unreadable(self.folder, error) from None
        return [(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]


RESTORE = "restore the adapter, or train it again"


class Pair(NamedTuple):
    """The two tensors of a linear: A [r, in] and B [out, r]. shape: [out, in]. names: of A and B in the file."""

    names: tuple[str, str]
    shape: list[int]
    rank: int


class AdapterConfig(BaseModel):
    """The keys of `adapter_config.json` that the plugin reads. base: the name of the model that the adapter was made for."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    base: str | None = Field(None, alias="base_model_name_or_path")
    r: int = Field(8, ge=1)
    lora_alpha: float = 8.0
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    bias: Literal["none"] = "none"


def _folder(options: Any) -> Path:
    """The folder of the adapter. Raises BadOption if there is none, or if it lacks a file."""
    if not options.adapter:
        raise BadOption(
            f"lora needs an adapter: set lora.adapter to {_names()}, or to a folder with {CONFIG} and {WEIGHTS}; "
            "`pitlane train MODEL FILES --lora --out FOLDER` makes such a folder"
        )
    shipped = SHIPPED.get(options.adapter)
    if shipped is not None:
        missing = [file.name for file in _files(shipped.folder) if not file.is_file()]
        if missing:
            raise BadOption(
                f"the shipped adapter {options.adapter} lacks {' and '.join(missing)} in {shipped.folder}; reinstall pitlane, or "
                "set lora.adapter to the folder of a PEFT adapter"
            )
        return shipped.folder
    try:
        folder = Path(options.adapter).expanduser()
        is_folder, missing = folder.is_dir(), [file.name for file in _files(folder) if not file.is_file()]
        has_pickle = is_folder and any(folder.glob("adapter_model.bin"))
    except (OSError, RuntimeError, ValueError) as error:  # no path: too long, a null byte, an unknown user
        raise _unreadable(options.adapter, error) from None
    if not is_folder:
        raise BadOption(
            f"lora.adapter = {options.adapter!r}: no such folder; give the folder of a PEFT adapter, or {_names()}"
        )
    if WEIGHTS in missing and has_pickle:
        raise BadOption(f"{folder} holds only pickle weights, which can run code; save the adapter as safetensors")
    if missing:
        raise BadOption(f"{folder} lacks {' and '.join(missing)}; give the folder of a PEFT adapter")
    return folder


def _names() -> str:
    """The names of the shipped adapters, with their models."""
    return " or ".join(f"{name!r} (made for {adapter.base})" for name, adapter in SHIPPED.items())


def _files(folder: Path) -> tuple[Path, Path]:
    return folder / CONFIG, folder / WEIGHTS


def _unreadable(folder: Path | str, error: Exception) -> BadOption:
    return BadOption(
        f"the adapter {str(folder)[:200]!r} cannot be read ({' '.join(str(error).split())[:200]}); {RESTORE}"
    )


def _read_config(folder: Path) -> AdapterConfig:
    file = folder / CONFIG
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{file.stat().st_size:,} bytes, at most {MAX_CONFIG_BYTES:,} are read")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from None
    try:
        config = AdapterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise BadOption(f"{file}: {key}: {first['msg']}, got {first['input']!r:.80}; use another adapter") from None
    for key, reason in UNSUPPORTED.items():
        if raw.get(key):
            raise BadOption(f"{file}: {key} = {raw[key]!r:.80} is not supported: {reason}; use another adapter")
    if raw.get("init_lora_weights") not in KEEP_MODEL:
        raise BadOption(
            f"{file}: init_lora_weights = {raw['init_lora_weights']!r:.80} is not supported: such a training changes the model "
            "too; convert the adapter with PEFT, or use another adapter"
        )
    return config


def _open(folder: Path) -> tuple[Any, dict[str, Pair]]:
    """Open the weights. Returns the file, and the tensors of every module. Reads no tensor."""
    from safetensors import SafetensorError, safe_open

    path, names = folder / WEIGHTS, dict[str, dict[str, str]]()
    try:
        file: Any = safe_open(str(path), framework="pt", device="cpu")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    for name, tensor in slices.items():
        match = TENSOR.fullmatch(name)
        if match is None:
            reason = "LoRA of embeddings" if "lora_embedding" in name else "only LoRA weights of linears"
            raise BadOption(f"{path} holds {name!r:.200}, which is not supported ({reason}); use another adapter")
        if tensor.get_dtype() not in FLOATS or len(tensor.get_shape()) != 2:
            kind = f"{tensor.get_dtype()} {tensor.get_shape()}"
            raise BadOption(f"{path}: {name!r:.200} must be a matrix of {', '.join(FLOATS)}, got {kind}; {RESTORE}")
        names.setdefault(match[1], {})[match[2]] = name
    if not names:
        raise BadOption(f"{path} holds no tensor; {RESTORE}")
    return file, {module: _pair(path, module, pair, slices) for module, pair in names.items()}


def _pair(path: Path, module: str, names: dict[str, str], slices: dict[str, Any]) -> Pair:
    if len(names) < 2:
        (letter,) = names
        raise BadOption(f"{path}: {module!r:.200} has lora_{letter} and no lora_{'BA'['AB'.index(letter)]}; {RESTORE}")
    a, b = (list(slices[names[letter]].get_shape()) for letter in "AB")
    if a[0] != b[1]:
        raise BadOption(f"{path}: the ranks of {module!r:.200} differ: lora_A is {a}, lora_B is {b}; {RESTORE}")
    return Pair((names["A"], names["B"]), [b[0], a[1]], a[0])


def _matching(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that a module's name ends with; a key is a regular expression, as in PEFT."""
    for key, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise BadOption(f"{CONFIG}: {key!r:.80} is no regular expression ({error}); {RESTORE}") from None
    return default
