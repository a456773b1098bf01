"""The parts of a model: the recorder names the tensors that the builder reads, and the weight plan reckons their bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.builder import Builder
from pitlane.engine.models.decoder import Decoder, parts_of
from pitlane.engine.models.parts import EmbeddingPart, LinearPart, LinearPlan, NormPart, Part
from pitlane.engine.models.presets import PRESETS, preset
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.weight_plan import WeightPlan
from tests.engine.models.harness import CPU, Harness, load, shapes_of
from tests.engine.models.test_architectures import CASES, make, tokens


class Shapes:
    """A source of tensors without memory. Counts the reads."""

    num_bytes = 0

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes, self.num_reads = shapes, Counter[str]()

    def names(self) -> list[str]:
        return list(self.shapes)

    def get(self, name: str) -> Tensor:
        self.num_reads[name] += 1
        return torch.zeros((), dtype=torch.bfloat16).expand(self.shapes[name])

    def fingerprint(self) -> str:
        return ""


def check_the_builder_reads_the_recorded_tensors(config: Any) -> None:
    shapes = shapes_of(config)
    source = Shapes(shapes)

    def plan_of(part: Part) -> LinearPlan:
        def build(tensors: list[Any]) -> Any:
            expected = list(shapes.values()) if isinstance(part, LinearPart) and part.tied_to else part.shapes.values()
            assert all(tuple(tensor.shape) in expected for member in tensors for tensor in member.values())
            return len(tensors)

        return LinearPlan(0, 0, build)

    def ask(hook: str, part: Part) -> tuple[LinearPlan, str] | None:
        is_whole = not isinstance(part, LinearPart) or hook == "build_linear"
        return (plan_of(part), "a plugin") if is_whole else None

    context = BuildContext(config, torch.bfloat16, CPU)
    Decoder(config, Builder(WeightPlan.of(parts_of(config), context, ask), source, context.dtype, CPU))
    assert source.num_reads == Counter(dict.fromkeys(shapes, 1)), "every tensor is read once"


@pytest.mark.parametrize("name", PRESETS)
def test_the_builder_reads_the_recorded_tensors_of_every_preset(name: str) -> None:
    check_the_builder_reads_the_recorded_tensors(preset(name))


@pytest.mark.parametrize("case", CASES)
def test_the_parts_are_the_checkpoint_and_their_bytes_are_exact(case: str, tmp_path: Path) -> None:
    """For every family: names and shapes of the files of transformers, and the bytes of the built model."""
    make(*CASES[case], tmp_path)
    source = resolve(str(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    assert shapes_of(source.config) == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    check_the_builder_reads_the_recorded_tensors(source.config)
    plan = WeightPlan.of(parts_of(source.config), BuildContext(source.config, torch.float32, CPU))
    assert plan.num_bytes == sum(tensor.numel() for tensor in stored.values()) * 4, "a tied table counts once"
    largest = max(part.num_values for part in parts_of(source.config) if isinstance(part, LinearPart))
    assert plan.num_bytes <= plan.peak_bytes <= plan.num_bytes + 4 * largest


def test_a_part_says_what_it_is_made_of() -> None:
    parts = {part.name: part for part in parts_of(preset("qwen2.5-0.5b"))}
    at = "model.layers.0.self_attn."
    qkv = parts[f"{at}q_proj+k_proj+v_proj"]
    assert isinstance(qkv, LinearPart)
    sizes = {f"{at}q_proj": 896, f"{at}k_proj": 128, f"{at}v_proj": 128}
    assert [tuple(member) for member in qkv.members] == list(sizes.items())
    assert (qkv.in_features, qkv.out_features, qkv.bias, qkv.split) == (896, 1152, True, "out")
    assert qkv.alone(qkv.members[1]).shapes == {f"{at}k_proj.weight": (128, 896), f"{at}k_proj.bias": (128,)}
    down, head = parts["model.layers.0.mlp.down_proj"], parts["lm_head"]
    assert isinstance(down, LinearPart) and down.split == "in"
    assert isinstance(head, LinearPart) and head.tied_to == "model.embed_tokens" and head.shapes == {}
    assert parts["model.embed_tokens"] == EmbeddingPart("model.embed_tokens", 151936, 896, is_tied=True)
    assert parts["model.norm"] == NormPart("model.norm", 896)


def test_a_tied_table_counts_once_on_every_device() -> None:
    config = preset("qwen2.5-0.5b")
    parts = parts_of(config)
    num_bytes = 2 * sum(part.num_parameters for part in parts)
    cpu, cuda = (
        WeightPlan.of(parts, BuildContext(config, torch.bfloat16, torch.device(name))) for name in ("cpu", "cuda")
    )
    assert cpu.num_bytes == cuda.num_bytes == num_bytes
    changed = WeightPlan.of(parts, BuildContext(config, torch.bfloat16, CPU), is_transformed=True)
    assert changed.num_bytes == num_bytes + 2 * 151936 * 896, "a changed table is no view of the file"

    def head(hook: str, part: Part) -> tuple[LinearPlan, str] | None:
        is_head = isinstance(part, LinearPart) and part.tied_to is not None
        return (LinearPlan(1000, 1000, len), "a plugin") if is_head else None

    packed = WeightPlan.of(parts, BuildContext(config, torch.bfloat16, torch.device("cuda")), head)
    assert packed.num_bytes == num_bytes + 1000, "the table stays on the device beside another head"


def test_the_core_reads_the_table_for_a_tied_head_from_its_embedding() -> None:
    """As on CUDA, here on the device meta, which has no memory."""
    config, meta = preset("qwen2.5-0.5b"), torch.device("meta")
    plan = WeightPlan.of(parts_of(config), BuildContext(config, torch.bfloat16, meta))
    model = Decoder(config, Builder(plan, Shapes(shapes_of(config)), torch.bfloat16, meta))
    assert model.head is model.embedding.linear and model.head.weight is model.embedding.weight


def test_a_tied_checkpoint_that_holds_only_the_head_is_complete(tmp_path: Path) -> None:
    make("Llama", {"tie_word_embeddings": True}, tmp_path)
    expected = Harness(load(tmp_path)).run({0: tokens(1)})
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    assert torch.equal(Harness(load(tmp_path)).run({0: tokens(1)}), expected)


class Prefixed:
    """Stored names of another family."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self.source.get(name.removeprefix("other."))
        return tensor


def test_the_builder_reads_stored_names() -> None:
    source = resolve("random:tiny")
    plan = WeightPlan.of(parts_of(source.config), BuildContext(source.config, torch.float32, CPU))
    renamed: Any = Prefixed(source.weights)
    with torch.inference_mode():
        model = Decoder(
            source.config, Builder(plan, renamed, torch.float32, CPU, stored_name=lambda name: f"other.{name}")
        )
    assert torch.equal(Harness(model).run({0: tokens(1)}), Harness(load("random:tiny")).run({0: tokens(1)}))
