"""Start weights that copy, before any training."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bundled_model.copying import init_copying
from pitlane.training.errors import TrainingError


def copier(vocabulary: int, layers: int = 4, hidden: int = 256) -> PreTrainedModel:
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=320, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, rms_norm_eps=1e-5, pad_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        )
    )  # fmt: skip
    init_copying(model)
    return model.eval()


def repeated(half: torch.Tensor, vocabulary: int) -> float:
    """Feed the tokens twice; return the share of right predictions in the repeat, from its fourth token on."""
    with torch.no_grad():
        guesses = copier(vocabulary)(torch.cat([half, half], dim=1)).logits[:, half.shape[1] + 2 : -1].argmax(-1)
    return (guesses == half[:, 3:]).double().mean().item()


@pytest.mark.parametrize("length", [256, 512])
def test_an_earlier_run_of_random_tokens_is_repeated(length: int) -> None:
    assert repeated(torch.randint(6, 4096, (2, length // 2)), 4096) >= 0.95


def test_a_small_vocabulary_will_do() -> None:
    assert repeated(torch.stack([6 + torch.randperm(58)[:48] for _ in range(2)]), 64) >= 0.95


def test_random_weights_do_not_copy() -> None:
    torch.manual_seed(1)
    half = torch.randint(6, 2048, (2, 128))
    model = copier(2048)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.02)
    with torch.no_grad():
        guesses = model(torch.cat([half, half], dim=1)).logits[:, 130:-1].argmax(-1)
    assert (guesses == half[:, 3:]).double().mean() < 0.1


def test_other_shapes_are_refused() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(TrainingError, match="4 heads of 64 on 2 KV heads, not 2 of 16"):
        init_copying(model)
