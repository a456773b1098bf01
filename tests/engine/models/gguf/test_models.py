"""A GGUF file gives the logits of the model that it was made of: every architecture, every type of tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pitlane.engine.errors import ModelError
from pitlane.engine.models.gguf.blocks import BLOCK_TYPES
from pitlane.engine.models.registry import resolve
from pitlane.engine.plan.plugin import Plugin, hookimpl
from pitlane.engine.plan.registry import PluginRegistry
from tests.engine.models.gguf.model_files import SCALES, convert
from tests.engine.models.harness import Harness, load
from tests.engine.models.test_architectures import ATOL, LLAMA3, RTOL, YARN, make, reference, tokens
from tests.engine.models.test_gemma3 import LINEAR

THETA = {"rope_type": "default", "rope_theta": 500.0}
SMOLLM3 = {"num_hidden_layers": 5, "pad_token_id": 0, "bos_token_id": 1}
GEMMA = {"num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
FULL, SLIDING = {"rope_theta": 5000.0, **LINEAR}, {"rope_type": "default", "rope_theta": 10000.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": THETA}),
    "llama, multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head_dim": ("Llama", {"head_dim": 32}),
    "llama, llama3 scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear scaling": ("Llama", {"rope_parameters": {**LINEAR, "rope_theta": 10000.0}}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, yarn with parameters": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}}),
    "mistral": ("Mistral", {"sliding_window": 11}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3, biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "smollm3": ("SmolLM3", {**SMOLLM3, "rope_parameters": THETA}),
    "gemma3": ("Gemma3", GEMMA),
    "gemma3, scaled": (
        "Gemma3",
        {**GEMMA, "rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}},
    ),
    "gemma3, head of its own": ("Gemma3", {**GEMMA, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    folder = tmp_path / "folder"
    theirs = make(family, {"num_key_value_heads": 2, **options}, folder)
    file = convert(folder, tmp_path / "model.gguf")
    assert resolve(str(file)).config == resolve(str(folder)).config
    ids = tokens(1)
    ours, same = (Harness(load(model)).run({0: ids}) for model in (file, folder))
    torch.testing.assert_close(ours, reference(theirs, ids), atol=ATOL, rtol=RTOL)
    assert torch.equal(ours, same)


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_key_value_heads": 2}
ERRORS = {
    "F32": 0.0,
    "F16": 5e-4,
    "BF16": 4e-3,
    "Q8_0": 0.01,
    "Q5_0": 0.05,
    "Q5_1": 0.05,
    "Q4_0": 0.1,
    "Q4_1": 0.1,
    "MXFP4": 0.15,
}


@pytest.mark.parametrize("kind", [block.name for block in BLOCK_TYPES.values()])
def test_types_of_tensors(kind: str, tmp_path: Path) -> None:
    """The logits are those of the same decoded weights in safetensors. ERRORS: of weights, relative, root mean square."""
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    folder = tmp_path / "folder"
    make("Llama", WIDE, folder)
    before = load_file(folder / "model.safetensors")
    file = convert(folder, tmp_path / "model.gguf", kind, dtype)
    source = resolve(str(file))
    assert {source.weights.get(name).dtype for name in before} == {dtype}
    assert source.config.dtype == str(dtype).removeprefix("torch.")
    ours, decoded = (Harness(load(model)).run({0: tokens(1)}) for model in (file, folder))
    assert torch.equal(ours, decoded)
    assert 0.1 < float(ours.std()) < 100
    for name, weight in before.items():
        if kind not in SCALES:
            assert float((source.weights.get(name).float() - weight).norm() / weight.norm()) <= ERRORS[kind], name


def test_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are not cut, whatever the size of a chunk."""
    monkeypatch.setattr("pitlane.engine.models.gguf.stream.CHUNK", 3 * 64)
    folder = tmp_path / "folder"
    make("Llama", {"attention_bias": True}, folder)
    file = convert(folder, tmp_path / "model.gguf")
    stored, expected = resolve(str(file)).weights, resolve(str(folder)).weights
    assert sorted(stored.names()) == sorted(expected.names())
    for name in expected.names():
        assert torch.equal(stored.get(name), expected.get(name)), name


def test_an_engine_serves_it(make_engine: Any, tmp_path: Path) -> None:
    from pitlane.engine.requests import SamplingParams
    from pitlane.engine.text.byte_tokenizer import byte_tokenizer

    folder = tmp_path / "folder"
    make("Llama", {}, folder)
    file = convert(folder, tmp_path / "model.gguf")
    byte_tokenizer(300).save_pretrained(folder)
    few = SamplingParams(max_tokens=12, ignore_eos=True)
    ours, expected = (make_engine(str(model)).generate("Hello", few) for model in (file, folder))
    assert ours.token_ids == expected.token_ids
    assert ours.stats["model"] == str(file)


def test_names_of_files(tmp_path: Path) -> None:
    """A plugin may open a GGUF file in its own way. The core opens it otherwise; other files keep their message."""
    folder = tmp_path / "folder"
    make("Llama", {}, folder)
    file = convert(folder, tmp_path / "model.GGUF")
    opened: list[str] = []

    class Opens(Plugin):
        name, exactness = "opens", "identical"

        @hookimpl
        def load_model(self, name: str) -> Any:
            opened.append(name)
            return resolve("random:tiny") if name.endswith("own.gguf") else None

    registry = PluginRegistry()
    registry.add(Opens)
    assert resolve(str(tmp_path / "own.gguf"), registry).name == "random:tiny"
    source = resolve(str(file), registry)
    assert opened == [str(tmp_path / "own.gguf"), str(file)]
    assert source.name == str(file) and source.folder is not None and (source.folder / "gguf.json").is_file()
    for missing in ("nowhere.gguf", "owner/nowhere.gguf", str(tmp_path / "nowhere.gguf")):
        with pytest.raises(ModelError, match=r"no such file: .*nowhere\.gguf; give a folder"):
            resolve(missing)
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match="is a file; give the folder that holds"):
        resolve(str(tmp_path / "model.bin"))
    with pytest.raises(ModelError, match="no config.json in"):
        resolve(str(tmp_path))
