"""Checkpoints of every format: the decoded weights are those that the format describes, and the kernels give the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pitlane import BuildContext, LinearPart, parts_of
from pitlane.engine.models.builder import Builder
from pitlane.engine.models.decoder import Decoder
from pitlane.engine.models.families.core import CORE_FAMILIES
from pitlane.engine.models.families.family import Families
from pitlane.engine.models.quantized import gptq
from pitlane.engine.models.source import ModelSource
from pitlane.engine.models.weight_plan import WeightPlan
from pitlane.plugins.packed_checkpoint import PackedCheckpoint, summary
from tests.engine.models.harness import CPU, Harness
from tests.engine.models.quantized.checkpoints import CASES, Case, compressed, write

TOKENS = [5, 77, 300, 41, 8, 8, 130, 251, 499]


def opened(folder: Path) -> ModelSource:
    return ModelSource.open(str(folder), folder, Families(CORE_FAMILIES))


def logits(source: ModelSource, dtype: torch.dtype, plugin: PackedCheckpoint | None) -> torch.Tensor:
    """Logits of a prompt in one forward."""
    context = BuildContext(source.config, dtype, CPU, packings=source.packings)

    def ask(hook: str, part: object):  # type: ignore[no-untyped-def]
        if plugin is None or hook != "build_linear" or not isinstance(part, LinearPart):
            return None
        plan = plugin.build_linear(part, context)
        return None if plan is None else (plan, plugin)

    plan = WeightPlan.of(parts_of(source.config), context, ask)
    with torch.inference_mode():
        model = Decoder(source.config, Builder(plan, source.weights, dtype, CPU, stored_name=source.stored_name))
    return Harness(model, num_seqs=1, dtype=dtype).run({0: TOKENS}).float()


@pytest.mark.parametrize("name", CASES)
def test_decoded_weights(name: str, tmp_path: Path) -> None:
    dense = write(tmp_path, CASES[name])
    source = opened(tmp_path)
    for tensor, expected in dense.items():
        assert torch.equal(source.weights.get(tensor), expected.to(torch.bfloat16)), tensor
    assert len(dense) == len(source.packings) == 14


@pytest.mark.parametrize("rows", [64, 48])
def test_zero_points_of_blocks(rows: int, tmp_path: Path) -> None:
    """A block has a scale and a zero. The last block of 48 outputs is smaller."""
    whole = compressed(8, "block", "int-quantized", symmetric=False, block_structure=[rows, 32])
    blocks = Case(
        whole, 8, 32, symmetric=False, rows=rows, make=CASES["compressed-tensors in bytes with zero points"].make
    )
    dense = write(tmp_path, blocks)
    source = opened(tmp_path)
    for tensor, expected in dense.items():
        assert torch.equal(source.weights.get(tensor), expected.to(torch.bfloat16)), tensor
    assert len(dense) == len(source.packings) == 14


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_dense_model(name: str, tmp_path: Path) -> None:
    """In float32: the kernels keep the stored weights, the decoded weights are rounded to bfloat16, the dtype of the checkpoint."""
    write(tmp_path, CASES[name])
    source = opened(tmp_path)
    expected = logits(source, torch.float32, None)
    got = logits(source, torch.float32, PackedCheckpoint())
    spread = expected.std()
    assert spread > 0.1 and (got - expected).abs().max() < 0.03 * spread, "the logits differ by more than rounding"


def test_a_kernel_keeps_more_than_bfloat16(tmp_path: Path) -> None:
    """With scales of float16, packed weights are exact: the kernel is nearer to the weights in float32 than decoded weights."""
    dense = write(tmp_path, CASES["gptq"])
    source = opened(tmp_path)
    part = next(part for part in parts_of(source.config) if isinstance(part, LinearPart) and "o_proj" in part.name)
    context = BuildContext(source.config, torch.float32, CPU, packings=source.packings)
    plan = PackedCheckpoint().build_linear(part, context)
    assert plan is not None
    names = {f"{part.name}.weight".rpartition(".")[2]: f"{part.name}.weight"}
    linear = plan.build([source.weights.tensors(part.name, names)])  # type: ignore[attr-defined, list-item]
    x = torch.randn(5, part.in_features, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ dense[f"{part.name}.weight"].double().T
    assert (linear(x).double() - exact).abs().max() < 1e-5 * exact.abs().max()
    assert plan.num_bytes == sum(t.nbytes for t in (linear.packed,)), "the plan says what the linear takes"


def test_act_order_asks_for_members(tmp_path: Path) -> None:
    write(tmp_path, CASES["gptq with act-order"])
    source = opened(tmp_path)
    context = BuildContext(source.config, torch.float32, CPU, packings=source.packings)
    part = next(part for part in parts_of(source.config) if isinstance(part, LinearPart) and len(part.members) == 3)
    assert PackedCheckpoint().build_linear(part, context) is None
    assert PackedCheckpoint().build_linear(part.alone(part.members[0]), context) is not None


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("gptq", "4 bits, groups of 32: kernel"),
        ("gptq of 3 bits", "3 bits, groups of 32: decoded"),
        ("gptq in groups of 8 bits", "8 bits, groups of 32: decoded"),
        ("awq", "4 bits, groups of 64, zero points: kernel"),
    ],
)
def test_the_summary_says_what_runs_how(name: str, way: str, tmp_path: Path) -> None:
    write(tmp_path, CASES[name])
    source = opened(tmp_path)
    context = BuildContext(source.config, torch.float32, CPU, packings=source.packings)
    assert summary(context) == {way: 14}
    assert PackedCheckpoint.unavailable(context) is None
    assert PackedCheckpoint.unavailable(BuildContext(source.config, torch.float32, CPU)) is not None


def test_rules_of_gptq_change_the_modules_that_they_match() -> None:
    rules = {"-:.*o_proj": {}, "+:.*mlp": {"bits": 8, "group_size": 64}, ".*down_proj": {"bits": 2}}
    reader = gptq.Reader("gptq", CASES["gptq"].config | {"dynamic": rules})
    assert reader.packing_of("model.layers.0.self_attn.o_proj", 128) is None
    sizes = {}
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        packing = reader.packing_of(f"model.layers.0.{name}", 128)
        assert packing is not None
        sizes[name] = packing.bits, packing.group_size
    assert sizes == {"self_attn.q_proj": (4, 32), "mlp.up_proj": (8, 64), "mlp.down_proj": (8, 64)}


def test_the_config_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    write(tmp_path, CASES["gptq with zero points"])
    before = opened(tmp_path).weights.fingerprint()
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"checkpoint_format": "gptq"', '"checkpoint_format": "gptq_v2"'))
    assert opened(tmp_path).weights.fingerprint() != before


def test_a_bias_of_zeros_is_dropped_and_scales_of_activations_are_not_used(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
        tensors["model.layers.0.self_attn.q_proj.input_scale"] = torch.ones(1)
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)

    write(tmp_path, CASES["gptq"], edit=edit)
    assert opened(tmp_path).config.num_layers == 2
