"""Models to train: build a new model, read a folder, take layers of a teacher; and write a model to a folder.

The folder holds config, tokenizer files and safetensors; transformers and the engine load it. Each file replaces its previous
version in one rename, the weights last.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers import PreTrainedModel as Model
from transformers.utils import logging

from pitlane import CORE_FAMILIES
from pitlane.training.errors import TrainingError

logging.disable_progress_bar()
FAMILIES = tuple(family.model_type for family in CORE_FAMILIES)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a new Llama. `context` is in tokens."""

    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    context: int = 4096
    rope_theta: float = 1e6

    def __post_init__(self) -> None:
        heads, rest = divmod(self.hidden_size, self.head_dim)
        if rest or heads % self.num_kv_heads:
            raise TrainingError(
                f"hidden size {self.hidden_size} does not make heads of {self.head_dim} on {self.num_kv_heads} KV heads; "
                f"choose a multiple of {self.head_dim * self.num_kv_heads}"
            )


def build(shape: Shape, tokenizer: PreTrainedTokenizerBase, seed: int) -> Model:
    """Build a Llama with tied embeddings and random weights, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.hidden_size // shape.head_dim,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model folder. It must have a tokenizer.json: the corpus needs the offsets of tokens in the text."""
    if not (folder / "tokenizer.json").is_file():
        raise TrainingError(f"no tokenizer.json in {folder}; give the folder of a model with its tokenizer")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many types for damaged files
        raise TrainingError(f"cannot read the tokenizer in {folder}: {_first_line(error)}") from None
    return tokenizer


def read_model(folder: Path) -> Model:
    """Read a model in float32 from a folder."""
    if not (folder / "config.json").is_file():
        raise TrainingError(f"no config.json in {folder}; give the folder of a model")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family, is_quantized = values.get("model_type"), bool(values.get("quantization_config"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TrainingError(f"cannot read {folder / 'config.json'} ({error}); download the model again") from None
    if family not in FAMILIES:
        raise TrainingError(f"{folder} holds a {family!r} model; trained are {', '.join(FAMILIES)}")
    if is_quantized:
        raise TrainingError(
            f"{folder} holds a quantized model, whose weights cannot be trained; train the unquantized model"
        )
    try:
        model: Model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # transformers raises many types when config and tensors do not fit
        raise TrainingError(f"cannot read the model in {folder}: {_first_line(error)}") from None
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def take_layers(teacher: Model, layers: Sequence[int]) -> Model:
    """Return a new model with the teacher's embeddings and norms, and the named layers in the given order.

    A repeated layer starts silent: weights and biases of its two output projections are zero. So a model that grows by repeated
    layers computes the same function as before.
    """
    number = teacher.config.num_hidden_layers
    if not layers or not all(0 <= layer < number for layer in layers):
        raise TrainingError(f"layers {list(layers)} of a model that has layers 0 to {number - 1}; name some of these")
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.exit_layers = len(layers), []
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[layer] for layer in layers])
    student: Model = type(teacher)(config)
    weights = {name: tensor for name, tensor in teacher.state_dict().items() if ".layers." not in name}
    for place, layer in enumerate(layers):
        for name, tensor in teacher.model.layers[layer].state_dict().items():
            silent = layer in layers[:place] and name.split(".")[-2] in ("o_proj", "down_proj")
            weights[f"model.layers.{place}.{name}"] = torch.zeros_like(tensor) if silent else tensor
    student.load_state_dict(weights)
    return student


def check_same_tokenizer(teacher: Path, student: Path) -> None:
    """Refuse a student whose token ids have other texts than the teacher's."""
    teacher_ids, student_ids = read_tokenizer(teacher).get_vocab(), read_tokenizer(student).get_vocab()
    if teacher_ids == student_ids:
        return
    tokens = teacher_ids.keys() | student_ids.keys()
    differing = sorted(token for token in tokens if teacher_ids.get(token) != student_ids.get(token))
    raise TrainingError(
        f"teacher ({len(teacher_ids)} tokens) and student ({len(student_ids)} tokens) have different tokenizers: "
        f"{len(differing)} tokens differ, such as {differing[0]!r}; distillation compares tokens one by one, so train the "
        "student with the teacher's tokenizer"
    )


def write_model(model: Model, tokenizer_from: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write config, tokenizer files and weights."""
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        exported = copy.deepcopy(model).to("cpu", dtype)
        exported.config._attn_implementation = "sdpa"
        exported.save_pretrained(part)
        for path in part.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors lets only the owner read
        for name in TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, part / name)
        for path in sorted(part.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot write the model to {folder}: {error}; the files there are untouched") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
