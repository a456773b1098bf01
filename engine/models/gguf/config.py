"""The metadata of a GGUF model as the values of a `config.json` and of a `generation_config.json`.

The family of the architecture then checks all values, as it checks those of a file (`families/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.config_file import short
from pitlane.engine.models.gguf.blocks import F16, F32, TensorInfo, decode
from pitlane.engine.models.gguf.keys import Keys
from pitlane.engine.models.gguf.names import ARCHITECTURES, ROPE_FREQS, Architecture
from pitlane.engine.models.gguf.reader import GGUF, rows
from pitlane.engine.models.gguf.rope import rope_values

END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<end_of_turn>")
CONTROL = 3  # token type of a special token
MAX_FACTORS = 2**12


def architecture_of(model: GGUF) -> Architecture:
    """Raises UnsupportedModel with the known architectures."""
    name = model.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(f"{model.files[0]}: architecture {short(name)} is not supported; known: {known}")
    return ARCHITECTURES[name]


def config_values(model: GGUF) -> dict[str, Any]:
    """The values of the model's `config.json`. Raises ModelError."""
    architecture = architecture_of(model)
    keys = Keys(model.files[0], model.metadata, str(model.metadata["general.architecture"]))
    embedding = model.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{keys.file} lacks the tensor token_embd.weight; download it again")
    heads, head_dim = keys.size("attention.head_count"), _head_dim(keys)
    epsilon = "attention.layer_norm_rms_epsilon"
    values = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "hidden_size": keys.size("embedding_length"),
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.optional_size("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.required(epsilon, keys.decimal(epsilon)),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        "attention_bias": "blk.0.attn_q.bias" in model.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in model.tensors,
        **rope_values(keys, _factors(model), head_dim),
        "dtype": dtype_of(model.tensors),
    }
    for key in ("bos_token_id", "eos_token_id"):
        values[key] = model.metadata.get(f"tokenizer.ggml.{key}")
    _check_unsupported(keys, values)
    values |= _of_gemma3(keys, values) if architecture.norm_offset else _of_llama(keys, values)
    return {key: value for key, value in values.items() if value is not None}


def generation_values(model: GGUF) -> dict[str, Any]:
    """The values of `generation_config.json`: the ids that end an answer.

    They are the ids of three keys, and the special tokens with a text that ends a turn in a chat template of these families.
    Many files name only the end of a document; llama.cpp looks for such texts too.
    """
    ids = [model.metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS]
    texts, kinds = (model.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if isinstance(texts, list) and isinstance(kinds, list):
        specials = {
            text: index for index, (text, kind) in enumerate(zip(texts, kinds, strict=False)) if kind == CONTROL
        }
        ids += [specials.get(text) for text in END_TEXTS]
    ends = list(dict.fromkeys(index for index in ids if index is not None))
    return {"eos_token_id": ends} if ends else {}


def dtype_of(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype of the decoded model, by its matrices.

    Matrices of F32 or of F16 keep their dtype, and their values. All other types become bfloat16: the models were trained in it,
    and its 8 bits are as many as the finest quantized type has. Norms get the same dtype: the engine casts all tensors to one.
    """
    blocks = {info.block for info in tensors.values() if len(info.shape) > 1}
    if blocks == {F32}:
        return "float32"
    return "float16" if blocks - {F32} == {F16} else "bfloat16"


def _head_dim(keys: Keys) -> int:
    head_dim, value_dim = keys.optional_size("attention.key_length"), keys.optional_size("attention.value_length")
    head_dim = head_dim or keys.size("embedding_length") // max(1, keys.size("attention.head_count"))
    if value_dim not in (None, head_dim):
        raise UnsupportedModel(
            f"{keys.file}: heads of keys with {head_dim} values and of values with {value_dim} are not supported; "
            "choose another model"
        )
    return head_dim


def _factors(model: GGUF) -> list[float] | None:
    info = model.tensors.get(ROPE_FREQS)
    if info is None:
        return None
    if len(info.shape) != 1 or info.block != F32 or info.shape[0] > MAX_FACTORS:
        raise ModelError(
            f"{info.file}: {ROPE_FREQS} must be a row of F32, got {info.block.name} {info.shape}; download it again"
        )
    return [float(factor) for factor in decode(rows(info, 0, 1), info.block)]


def _check_unsupported(keys: Keys, values: Mapping[str, Any]) -> None:
    experts, scale = keys.get("expert_count"), keys.decimal("attention.scale")
    if experts:
        raise UnsupportedModel(
            f"{keys.file}: a model of {short(experts)} experts is not supported; choose another model"
        )
    if scale and abs(scale * values["head_dim"] ** 0.5 - 1) > 1e-4:
        raise UnsupportedModel(
            f"{keys.file}: attention.scale {scale} is not supported, only 1 / sqrt(head size); choose another model"
        )
    for key in ("logit_scale", "residual_scale", "embedding_scale"):
        if keys.get(key) not in (None, 0.0, 1.0):
            raise UnsupportedModel(f"{keys.file}: {key} {short(keys.get(key))} is not supported; choose another model")
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > values["vocab_size"]:
        raise ModelError(
            f"{keys.file} has {len(tokens):,} tokens, but token_embd.weight has {values['vocab_size']:,} rows; download it again"
        )


def _of_llama(keys: Keys, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the Llama-like families. A `llama` with a sliding window is a Mistral."""
    more: dict[str, Any] = {"hidden_act": "silu"}
    window = keys.optional_size("attention.sliding_window")
    if not window or window >= values["max_position_embeddings"]:
        return more
    if values["model_type"] != "llama":
        raise UnsupportedModel(
            f"{keys.file}: a sliding window ({window} tokens) is not supported for {keys.architecture}: "
            "the file does not say for which layers; choose another file"
        )
    return more | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}


def _of_gemma3(keys: Keys, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of Gemma 3. As in llama.cpp: every sixth layer is full, and the scores of the model with 62 layers have a scale."""
    window, pattern = keys.optional_size("attention.sliding_window"), keys.get("attention.sliding_window_pattern")
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    more: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": values["hidden_size"] // max(1, heads) if layers == 62 else values["head_dim"],
        "rope_local_base_freq": keys.decimal("rope.freq_base_swa", 10000.0),
        "sliding_window": window or None,
        "final_logit_softcapping": keys.decimal("final_logit_softcapping") or None,
        "attn_logit_softcapping": keys.decimal("attn_logit_softcapping") or None,
    }
    if not window:
        return more | {"sliding_window_pattern": 1}
    if isinstance(pattern, list):
        return more | {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    return more | {"sliding_window_pattern": keys.optional_size("attention.sliding_window_pattern") or 6}
