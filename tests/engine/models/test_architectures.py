"""Every architecture equals transformers on a tiny random config, in prefill by chunks and in decode, over scattered slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pitlane.engine.models.decoder import residual_dtype
from tests.engine.models.harness import Harness, load

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 32}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn-rope": ("Llama", {"rope_parameters": YARN}),
    "yarn-rope-mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}),
    "yarn-rope-untruncated": ("Llama", {"rope_parameters": YARN | {"truncate": False}}),
    "yarn-rope-factor": ("Llama", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 11}),
    "mistral-window-of-one": ("Mistral", {"sliding_window": 1}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "pad_token_id": 0, "bos_token_id": 1}),
    "smollm3-window": (
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "use_sliding_window": True,
            "sliding_window": 6,
            "no_rope_layers": [1, 0, 1, 0],
        },
    ),
}
LENGTH = 40
ATOL = RTOL = 1e-4


def make(family: str, options: dict[str, Any], folder: Path, shard: str = "5GB") -> Any:
    """Make a random transformers model and save it as a folder. Norms and biases are random too, so that they matter."""
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model = model_class(model_class.config_class(**(BASE | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def tokens(seed: int, length: int = LENGTH) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, BASE["vocab_size"], (length,), generator=generator).tolist()
    return ids


def reference(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
        return logits


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    theirs = make(*CASES[case], tmp_path)
    ours = Harness(load(tmp_path))
    first, second = tokens(1), tokens(2)
    logits_of: dict[int, list[Tensor]] = {0: [], 1: []}

    def feed(chunks: dict[int, list[int]]) -> None:
        logits = ours.run(chunks)
        for seq, part in zip(chunks, logits.split([len(ids) for ids in chunks.values()]), strict=True):
            logits_of[seq].append(part)

    feed({0: first[:13]})
    feed({0: first[13:30], 1: second[:21]})  # chunks start inside runs of slots and span several
    feed({1: second[21:37], 0: first[30:31]})
    for index in range(31, 37):
        feed({0: first[index : index + 1]})
    for index in range(37, LENGTH):  # both sequences decode in one batch
        feed({0: first[index : index + 1], 1: second[index : index + 1]})
    for seq, ids in ((0, first), (1, second)):
        torch.testing.assert_close(torch.cat(logits_of[seq]), reference(theirs, ids), atol=ATOL, rtol=RTOL)


def test_packed_weights_equal_transformers(tmp_path: Path) -> None:
    """The linears are large enough to be reordered for oneDNN (`layers.MIN_PACKED`)."""
    options = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.05}
    theirs = make("Qwen2", options, tmp_path)
    model = load(tmp_path)
    assert model.layers[0].gate_up.packed
    ours = Harness(model)
    ids = tokens(3)
    result = torch.cat([ours.run({0: ids[:30]}), *(ours.run({0: [token]}) for token in ids[30:])])
    torch.testing.assert_close(result, reference(theirs, ids), atol=ATOL, rtol=RTOL)


def test_shards(tmp_path: Path) -> None:
    theirs = make("Llama", {}, tmp_path, shard="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = tokens(4)
    torch.testing.assert_close(Harness(load(tmp_path)).run({0: ids}), reference(theirs, ids), atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.012), (torch.float64, 1e-5)], ids=str
)
def test_dtypes(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    """The error relative to the largest float32 logit is within the tolerance of the dtype."""
    make("Qwen3", {"head_dim": 32, "initializer_range": 0.05}, tmp_path)
    exact = Harness(load(tmp_path)).run({0: tokens(5)})
    rounded = Harness(load(tmp_path, dtype), dtype=dtype).run({0: tokens(5)})
    assert rounded.dtype == residual_dtype(dtype)
    assert (rounded.double() - exact.double()).abs().max() / exact.abs().max() < tolerance


def test_float64_does_not_depend_on_chunks(tmp_path: Path) -> None:
    make("Llama", {}, tmp_path)
    model = load(tmp_path, torch.float64)
    whole, apart = (Harness(model, dtype=torch.float64) for _ in range(2))
    ids = tokens(6)
    steps = torch.cat([apart.run({0: ids[:7]}), *(apart.run({0: [token]}) for token in ids[7:])])
    torch.testing.assert_close(whole.run({0: ids}), steps, atol=1e-11, rtol=1e-11)


def test_early_exit_equals_a_shorter_model(tmp_path: Path) -> None:
    theirs = make("Llama", {}, tmp_path)
    theirs.model.layers = theirs.model.layers[:2]
    ids = tokens(7)
    result = Harness(load(tmp_path)).run({0: ids}, num_layers=2)
    torch.testing.assert_close(result, reference(theirs, ids), atol=ATOL, rtol=RTOL)


def test_only_wanted_rows(tmp_path: Path) -> None:
    make("Llama", {}, tmp_path)
    harness = Harness(load(tmp_path))
    every = harness.run({0: tokens(8)})
    harness.kvs[0].num_computed_tokens = 0
    torch.testing.assert_close(harness.run({0: tokens(8)}, rows=[LENGTH - 1, 3]), every[[LENGTH - 1, 3]])


def test_groups_by_window(tmp_path: Path) -> None:
    make(*CASES["qwen2-window"], tmp_path)
    groups = load(tmp_path).kv_groups
    assert [(group.layers, group.window) for group in groups] == [((0,), None), ((1, 2), 9)]


def test_stories_tell_a_story(shared_data: Path) -> None:
    from pitlane.engine.models.registry import resolve
    from pitlane.engine.text.tokenizer import Tokenizer

    folder = shared_data / "models" / "stories260K"
    tokenizer = Tokenizer(resolve(str(folder)))
    harness = Harness(load(folder), num_seqs=1, num_tokens=128)
    ids = tokenizer.encode("Once upon a time, there was a little girl named Lily.")
    logits = harness.run({0: ids})
    for _ in range(30):
        ids.append(int(logits[-1].argmax()))
        logits = harness.run({0: ids[-1:]})
    assert "loved to play" in tokenizer.decode(ids)
