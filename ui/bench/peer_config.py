"""transformers' configuration for a model, to measure the same shape in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pitlane.models import ModelSource


def peer_config(source: ModelSource) -> Any:
    """The `config.json` of the model's folder; for a random preset, its numbers under transformers' names."""
    from transformers import AutoConfig

    from pitlane.models import transformers_type

    if source.folder is not None:
        return AutoConfig.from_pretrained(str(source.folder), local_files_only=True, trust_remote_code=False)
    config = source.config
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    rope |= {key: int(value) if key.startswith("original_") else value for key, value in config.rope.parameters.items()}
    special: dict[str, Any] = {}
    if config.no_rope_layers:
        special["no_rope_layers"] = [int(layer not in config.no_rope_layers) for layer in range(config.num_layers)]
    if config.architecture == "MistralForCausalLM":
        special["sliding_window"] = config.windows[0]
    return AutoConfig.for_model(
        transformers_type(source),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        rope_parameters=rope,
        **special,
    )
