"""The formats' own libraries read what Pitlane writes, and Pitlane reads what they write.

compressed-tensors is read through transformers, which decodes it on a CPU. compressed-tensors 0.20 cannot load packed zero points
through transformers (it expects them unpacked), so they are compared with its compressor. transformers decodes FP8 in blocks on a
CPU. It reads GPTQ and AWQ through gptqmodel alone, which has no wheel: `tests/engine/models/quantized/` packs these formats from
their description.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pitlane import PluginRegistry
from pitlane.engine.models.registry import resolve
from pitlane.export.layouts import FORMATS
from pitlane.export.quantize import rounded
from pitlane.export.settings import Settings
from pitlane.formats import calibrated
from pitlane.plugins.packed_checkpoint import PackedCheckpoint
from tests.engine.models.quantized.checkpoints import CASES, linear, write
from tests.engine.models.quantized.test_readers import TOKENS, logits
from tests.export.test_methods import MIXED, SMOOTH, made
from tests.export.test_quantize import opened
from tests.export.test_quantize import write as quantized

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
# Against weights in float32: the kernels of integers keep the scales, all other linears are decoded to bfloat16.
EXACT, DECODED = 1e-5, 0.03


def logits_of_transformers(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.tensor([TOKENS])).logits[0]
    return result


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        (Settings(bits=4, group_size=128), EXACT),
        (Settings(bits=4, group_size=32), EXACT),
        (Settings(bits=8, group_size=0), EXACT),
        (Settings(bits=3, group_size=64), DECODED),
        (Settings(bits=5, group_size=32), DECODED),
    ],
)
def test_transformers_reads_compressed_tensors(settings: Settings, bound: float, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    quantized(settings, tmp_path / "out")
    expected = logits_of_transformers(tmp_path / "out")
    got = logits(opened(tmp_path / "out"), torch.float32, PackedCheckpoint())
    assert expected.std() > 0.1 and (got - expected).abs().max() < bound * expected.std()


@pytest.mark.parametrize("granularity", ["channel", "tensor", "block"])
def test_transformers_reads_float8(granularity: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    quantized(Settings("fp8", 8, 0, granularity=granularity), tmp_path / "out")
    expected = logits_of_transformers(tmp_path / "out")
    got = logits(opened(tmp_path / "out"), torch.float32, PackedCheckpoint())
    assert expected.std() > 0.1 and (got - expected).abs().max() < EXACT * expected.std()


@pytest.mark.parametrize("settings", [SMOOTH, MIXED], ids=["smoothquant", "mixed"])
def test_transformers_reads_a_method_with_a_recipe(settings: Settings, tmp_path: Path) -> None:
    """transformers rounds the inputs of smoothquant to 8 bits, as the config asks; Pitlane keeps them in float32 here."""
    pytest.importorskip("compressed_tensors")
    source = resolve("random:tiny")
    quantized(settings, tmp_path / "out", calibrated=calibrated(source, made(settings), PluginRegistry.load()))
    expected = logits_of_transformers(tmp_path / "out")
    got = logits(opened(tmp_path / "out"), torch.float32, PackedCheckpoint())
    bound = 0.1 if settings is SMOOTH else DECODED
    assert expected.std() > 0.1 and (got - expected).abs().max() < bound * expected.std()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_compressor_of_the_library_packs_the_same(bits: int, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(bits))
    settings = Settings(bits=bits, group_size=64, symmetric=symmetric)
    codes = rounded("weight", weight, settings, torch.float32)
    ours = FORMATS["compressed-tensors"].tensors(codes, settings, torch.float32)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    half = 2 ** (bits - 1)
    state = {"weight": codes.dequantized(), "weight_scale": ours["weight_scale"]}
    if codes.zeros is not None:
        state["weight_zero_point"] = (codes.zeros - half).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    assert torch.equal(theirs["weight_packed"], ours["weight_packed"])
    if codes.zeros is not None:
        assert torch.equal(theirs["weight_zero_point"], ours["weight_zero_point"])
    back = PackedQuantizationCompressor.decompress(dict(ours), scheme)
    assert torch.equal(back["weight"], codes.dequantized())


def test_transformers_reads_fp8_in_blocks(tmp_path: Path) -> None:
    write(tmp_path, CASES["fp8 in blocks"])
    expected = logits_of_transformers(tmp_path)
    got = logits(opened(tmp_path), torch.float32, PackedCheckpoint())
    assert expected.std() > 0.1 and (got - expected).abs().max() < DECODED * expected.std()


@pytest.mark.parametrize(
    "name", ["compressed-tensors in bytes", "compressed-tensors of float8", "compressed-tensors of float8 in blocks"]
)
def test_the_decompressor_of_the_library_agrees(name: str) -> None:
    """The packers of the tests and the library agree, so the tests of the readers stand on the library."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    case = CASES[name]
    stored, dense = linear(case, 128, 256, np.random.default_rng(3))
    weights = case.config["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(case.config["format"])
    assert torch.equal(
        compressor.decompress(dict(stored), scheme)["weight"].float(), dense.to(stored["weight_scale"].dtype).float()
    )
