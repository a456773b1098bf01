"""lora: the sum in float32, names and shapes that do not fit, two contents of one folder, packed weights over the sum."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pitlane import BadOption, BuildContext, PluginRegistry, SamplingParams, TensorPart
from pitlane.engine.models.presets import preset
from pitlane.engine.models.registry import resolve
from pitlane.models import estimate_memory
from pitlane.plugins.lora import UNSUPPORTED, Lora
from pitlane.storage.adapters import DOCUMENTS, SHIPPED, ShippedAdapter
from tests.engine.models.harness import CPU

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3)
PROMPT = list(range(1, 80))
Q = "model.layers.1.self_attn.q_proj"
MakeAdapter = Callable[..., Path]


def settings(adapter: Path, **options: Any) -> dict[str, Any]:
    return {"lora": {"adapter": str(adapter), **options}}


def plugin(adapter: Path, **options: Any) -> Lora:
    return Lora(Lora.Options(adapter=str(adapter), **options))


def model_of(engine: Any, plugins: dict[str, Any]) -> Any:
    return engine.lane_of(engine.plan(plugins)).built.model


def product(adapter: Path, module: str) -> torch.Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"].double() for letter in "AB")
    return b @ a


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


# ---- what is added


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_named_linear_gets_its_product(make_engine: Any, make_adapter: MakeAdapter, dtype: str) -> None:
    engine, adapter = make_engine(dtype=dtype), make_adapter(targets="_proj")
    core, tuned = model_of(engine, {}), model_of(engine, settings(adapter))
    assert engine.loader.config.dtype == "bfloat16", "the dtype in which the sum is stored"
    for at, layer in enumerate(zip(core.layers, tuned.layers, strict=True)):
        for fused, members in {
            "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "output": ["self_attn.o_proj"],
            "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "down": ["mlp.down_proj"],
        }.items():
            before, after = (getattr(half, fused).weight for half in layer)
            change = torch.cat([product(adapter, f"model.layers.{at}.{member}") for member in members])
            source = resolve("random:tiny").weights
            weight = torch.cat([source.get(f"model.layers.{at}.{member}.weight") for member in members])
            exact = weight.double() + 2 * change
            assert ((after.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()
            assert not torch.equal(after, before)
    assert torch.equal(tuned.norm, core.norm) and torch.equal(tuned.embedding.weight, core.embedding.weight)


def test_the_sum_is_computed_in_float32(make_adapter: MakeAdapter) -> None:
    """In bfloat16, the product would lose digits before it is added."""
    adapter = make_adapter(targets="q_proj", rank=32)
    context = BuildContext(preset("tiny"), torch.bfloat16, CPU)
    part = TensorPart(Q, (1,))  # the plugin reads the name alone
    weight = torch.randn(product(adapter, Q).shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = weight.clone()
    made = plugin(adapter).transform_weights(part, {"weight": weight, "bias": weight[0]}, context)
    assert made is not None and made["weight"].dtype == torch.bfloat16 and made["bias"] is not None
    exact = weight.double() + 2 * product(adapter, Q)
    assert ((made["weight"].double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all(), "rounded once"
    assert torch.equal(weight, before), "stored tensors are not written to"


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 6}, 1.5),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"alpha_pattern": {"q_proj": 1}}, 0.25),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 1, "q_proj": 2}}, 0.25),
        ({"alpha_pattern": {r"model\.layers\.\d+\.self_attn\.[qk]_proj": 1}}, 0.25),
        ({"alpha_pattern": {"proj": 1, "layers.1": 1, "_proj": 1}}, 2.0),
        ({"r": 9, "lora_alpha": 12, "rank_pattern": {"q_proj": 4}}, 3.0),
        ({"r": 4, "alpha_pattern": None, "rank_pattern": None, "modules_to_save": None, "use_dora": False}, 2.0),
    ],
    ids=str,
)
def test_the_scale_of_a_module_is_that_of_peft(make_adapter: MakeAdapter, config: dict[str, Any], scale: float) -> None:
    adapter = make_adapter(targets="layers.1.self_attn.q_proj", **config)
    assert plugin(adapter).scales == {Q: scale}
    assert plugin(adapter, scale=0.5).scales == {Q: scale / 2}


def test_names_of_a_family_are_mapped(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(targets="q_proj")
    rewrite(
        adapter,
        lambda tensors: [
            tensors.update({name.replace("q_proj", "query"): tensors.pop(name)}) for name in list(tensors)
        ],
    )
    lora = plugin(adapter)
    context = BuildContext(preset("tiny"), torch.float32, CPU, lambda name: name.replace("q_proj", "query"))
    assert lora.refusal(context) is None
    weight = torch.zeros(lora.pairs[Q.replace("q_proj", "query")].shape)
    made = lora.transform_weights(TensorPart(Q, (1,)), {"weight": weight}, context)
    assert made is not None and made["weight"].any()
    assert "has no linear of this name" in str(lora.refusal(BuildContext(preset("tiny"), torch.float32, CPU)))


# ---- plans


def test_with_and_without_stand_side_by_side(make_engine: Any, make_adapter: MakeAdapter) -> None:
    engine, adapter = make_engine(plugins=["prefix_cache"]), make_adapter()
    plans = [engine.plan({"prefix_cache": {}, **more}) for more in ({}, settings(adapter))]
    core, tuned = (engine.generate(PROMPT, PARAMS, plan=plan) for plan in plans)
    assert core.token_ids != tuned.token_ids and tuned.stats["exactness"] == "steering"
    assert tuned.stats["cached_tokens"] == 0, "KV of other weights is not shared"
    streams = [engine.submit(PROMPT, PARAMS, plan=plan) for plan in plans * 2]
    answers = [stream.result() for stream in streams]
    assert [answer.token_ids for answer in answers] == [core.token_ids, tuned.token_ids] * 2
    assert all(answer.stats["cached_tokens"] for answer in answers) and len(engine.lanes.all) == 2


def test_scale_0_changes_nothing(make_engine: Any, make_adapter: MakeAdapter) -> None:
    engine, adapter = make_engine(), make_adapter()
    core, off = (engine.generate(PROMPT, PARAMS, plan=engine.plan(s)) for s in ({}, settings(adapter, scale=0)))
    assert (core.token_ids, core.logprobs) == (off.token_ids, off.logprobs)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_two_contents_of_one_folder_share_neither_weights_nor_kv(
    make_engine: Any, make_adapter: MakeAdapter, file: str
) -> None:
    engine, adapter = make_engine(plugins=["prefix_cache"]), make_adapter(name="same")
    chosen = {"prefix_cache": {}, **settings(adapter)}
    first = engine.plan(chosen)
    assert engine.plan(chosen) is first
    before = engine.generate(PROMPT, PARAMS, plan=first)
    fingerprint = engine.lane_of(first).pool.fingerprint
    other = make_adapter(name="other", seed=7, lora_alpha=3)
    stat = (adapter / file).stat()
    shutil.copyfile(other / file, adapter / file)
    os.utime(adapter / file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = engine.plan(chosen)
    after = engine.generate(PROMPT, PARAMS, plan=second)
    assert after.token_ids != before.token_ids and after.stats["cached_tokens"] == 0
    assert first.variant_key != second.variant_key and first.kv_key != second.kv_key
    assert engine.lane_of(second).pool.fingerprint != fingerprint
    assert engine.generate(PROMPT, PARAMS, plan=first).token_ids == before.token_ids, "a loaded adapter stays loaded"


def test_an_adapter_that_changes_before_it_is_loaded_is_refused(make_engine: Any, make_adapter: MakeAdapter) -> None:
    engine, adapter = make_engine(), make_adapter(name="same")
    plan = engine.plan(settings(adapter))
    make_adapter(name="same", seed=8)
    with pytest.raises(BadOption, match="changed while it was read; send the request again"):
        engine.generate(PROMPT, PARAMS, plan=plan)
    assert engine.generate(PROMPT, PARAMS, plan=engine.plan(settings(adapter))).stats["failed"] == {}


@pytest.mark.parametrize("linear", ["int8", "int4", "packed_linear"])
def test_packed_weights_are_made_of_the_sum(make_engine: Any, make_adapter: MakeAdapter, linear: str) -> None:
    """A model whose files hold the sum gives the same answers under the same packing."""
    engine, adapter = make_engine("bundled", dtype="bfloat16"), make_adapter("bundled", targets="mlp")
    try:
        both = engine.plan({linear: {}, **settings(adapter)})
    except BadOption as error:
        pytest.skip(str(error))
    merged = merged_folder(adapter)
    expected = make_engine(str(merged), dtype="bfloat16", plugins=[linear]).generate(PROMPT, PARAMS)
    result = engine.generate(PROMPT, PARAMS, plan=both)
    assert result.stats["failed"] == {} and list(result.stats["plugins"]) == ["lora", linear]
    assert (result.token_ids, result.logprobs) == (expected.token_ids, expected.logprobs)
    alone = engine.generate(PROMPT, PARAMS, plan=engine.plan({linear: {}}))
    assert alone.token_ids != result.token_ids


def merged_folder(adapter: Path) -> Path:
    """The bundled model with the adapter in its weights."""
    source, target = resolve("bundled").folder, adapter.parent / "merged"
    assert source is not None
    shutil.copytree(source, target)
    tensors, pairs = load_file(source / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, weight in tensors.items():
        if ".mlp." in name:
            a, b = (pairs[f"base_model.model.{name.removesuffix('weight')}lora_{letter}.weight"] for letter in "AB")
            tensors[name] = torch.addmm(weight.float(), b, a, alpha=2).to(weight.dtype)
    save_file(tensors, target / "model.safetensors")
    return target


def test_memory_is_estimated_with_an_adapter(make_adapter: MakeAdapter) -> None:
    plain, tuned = (estimate_memory("random:tiny", plugins=plugins) for plugins in ({}, settings(make_adapter())))
    assert tuned.weight_plugins == ["lora"] and plain.parameters == tuned.parameters


# ---- shipped adapters


def test_a_shipped_adapter_is_named(make_engine: Any, ship_adapter: MakeAdapter) -> None:
    folder, engine = ship_adapter(), make_engine()
    core, named, own = (
        engine.generate(PROMPT, PARAMS, plan=engine.plan(chosen))
        for chosen in ({}, {"lora": {"adapter": DOCUMENTS}}, settings(folder))
    )
    assert named.token_ids == own.token_ids != core.token_ids
    assert engine.plan({"lora": {}}).settings == {"lora": {"adapter": DOCUMENTS, "scale": 1.0}}


def test_a_folder_of_that_name_stays_reachable(
    make_engine: Any, make_adapter: MakeAdapter, ship_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, own, engine = ship_adapter(), make_adapter(name=DOCUMENTS, seed=9), make_engine()
    monkeypatch.chdir(own.parent)
    assert Lora(Lora.Options(adapter=DOCUMENTS)).folder == shipped
    assert Lora(Lora.Options(adapter=f"./{DOCUMENTS}")).folder == Path(DOCUMENTS)
    named, in_folder = (engine.plan({"lora": {"adapter": name}}) for name in (DOCUMENTS, f"./{DOCUMENTS}"))
    assert named.variant_key != in_folder.variant_key


def test_another_content_of_a_shipped_adapter_is_another_variant(
    make_engine: Any, ship_adapter: MakeAdapter, make_adapter: MakeAdapter
) -> None:
    """A later version of Pitlane may ship a better adapter under the same name."""
    folder, engine = ship_adapter(), make_engine()
    before = engine.plan({"lora": {}})
    shutil.copyfile(make_adapter(seed=5) / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    assert engine.plan({"lora": {}}).kv_key != before.kv_key


def test_a_shipped_adapter_for_another_model_is_refused_with_its_model(
    make_engine: Any, ship_adapter: MakeAdapter
) -> None:
    ship_adapter("bundled")
    refused(
        make_engine(), DOCUMENTS, "lora cannot serve this model: the shipped adapter documents (made for 'bundled')",
        "set lora.adapter to the folder of an adapter for this model",
    )  # fmt: skip


def test_a_shipped_adapter_without_files_is_named(make_engine: Any, ship_adapter: MakeAdapter) -> None:
    (ship_adapter() / "adapter_model.safetensors").unlink()
    refused(make_engine(), DOCUMENTS, "the shipped adapter documents lacks adapter_model.safetensors", "reinstall")


def test_it_is_on_by_default_for_documents_and_for_its_model_alone(make_engine: Any, ship_adapter: MakeAdapter) -> None:
    folder = ship_adapter()
    engine, other = make_engine(plugins=None), make_engine("bundled", plugins=None)
    assert set(engine.document_plan.names) - set(engine.default_plan.names) == {"lora"}
    assert engine.document_plan.settings["lora"]["adapter"] == DOCUMENTS
    assert other.document_plan is other.default_plan and "lora" not in other.default_plan.names
    shape, shipped = resolve("random:tiny").config, SHIPPED[DOCUMENTS]
    same_shape = BuildContext(shape, torch.float32, CPU, fingerprint=lambda: "other weights")
    same_weights = BuildContext(shape, torch.float32, CPU, fingerprint=lambda: min(shipped.fingerprints))
    assert Lora.is_default_for_documents(same_weights) and not Lora.is_default_for_documents(same_shape)
    assert not Lora.is_default_for_documents(BuildContext(shape, torch.float32, CPU))
    (folder / "adapter_model.safetensors").unlink()
    assert not Lora.is_default_for_documents(same_weights)


def test_the_weights_of_a_model_count_and_not_its_name(
    make_engine: Any, ship_adapter: MakeAdapter, tmp_path: Path
) -> None:
    source = resolve("bundled").folder
    assert source is not None
    ship_adapter("bundled")
    shutil.copytree(source, tmp_path / "my-own-name")
    assert "lora" in make_engine(str(tmp_path / "my-own-name"), plugins=None).document_plan.names


def test_the_caller_changes_the_default_for_documents(make_engine: Any, ship_adapter: MakeAdapter) -> None:
    ship_adapter()

    def without_lora(default: dict[str, Any]) -> dict[str, Any]:
        return {name: options for name, options in default.items() if name != "lora"}

    for plugins in (without_lora, {}, {"prefix_cache": {}}):
        engine = make_engine(plugins=plugins)
        assert engine.document_plan is engine.default_plan and "lora" not in engine.document_plan.names
    registry = PluginRegistry.load()
    assert "lora" not in registry.default_settings(documents=True), "without a model nothing is known of its weights"


def test_an_engine_for_documents_loads_the_adapted_weights_alone(make_engine: Any, ship_adapter: MakeAdapter) -> None:
    ship_adapter()
    engine = make_engine(plugins=None, documents=True)
    assert engine.default_plan is engine.document_plan and "lora" in engine.default_plan.names
    assert len(engine.lanes.all) == 1 and "lora" in engine.generate(PROMPT, PARAMS).stats["plugins"]


def test_a_damaged_shipped_adapter_stops_no_engine(
    make_engine: Any, ship_adapter: MakeAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    (ship_adapter() / "adapter_config.json").write_text("{")
    engine = make_engine(plugins=None)
    assert engine.document_plan is engine.default_plan
    assert "questions about documents get the default plugins: " in caplog.text


@pytest.mark.parametrize("name", SHIPPED)
def test_the_files_that_are_shipped(name: str) -> None:
    adapter = SHIPPED[name]
    assert isinstance(adapter, ShippedAdapter) and (adapter.folder / "MODEL_CARD.md").is_file()
    if not (adapter.folder / "adapter_model.safetensors").is_file():
        pytest.skip("the weights of the adapter are not here")
    assert sum(file.stat().st_size for file in adapter.folder.iterdir() if file.is_file()) < 11e6
    shipped = Lora(Lora.Options(adapter=name))
    assert {pair.rank for pair in shipped.pairs.values()} == {16} and len(shipped.pairs) == 30 * 7
    tensors = load_file(adapter.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


# ---- what is refused


def refused(engine: Any, adapter: Path | str, *words: str) -> None:
    """The plan is refused in one line, again and again, and the engine goes on."""
    for _ in range(2):
        with pytest.raises(BadOption) as error:
            engine.plan({"lora": {"adapter": str(adapter)}})
        for word in words:
            assert word in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_an_adapter_for_another_model_is_refused_before_weights_are_read(
    make_engine: Any, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = make_adapter("random:llama-1b-draft", targets="layers.0.self_attn.q_proj", base_model_name_or_path="wide")
    engine = make_engine()
    monkeypatch.setattr(Lora, "transform_weights", None)
    refused(
        engine, wide, "lora cannot serve this model", "made for 'wide'", "model.layers.0.self_attn.q_proj",
        "[512, 512]", "in this model the shape is [128, 128]",
    )  # fmt: skip
    deep = make_adapter("bundled", targets="layers.7.mlp.up_proj")
    refused(engine, deep, "changes model.layers.7.mlp.up_proj", "no linear of this name")
    with pytest.raises(BadOption, match="no linear of this name"):
        estimate_memory("random:tiny", plugins=settings(deep))


def test_the_table_of_a_tied_head_is_refused(make_engine: Any, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter("bundled", targets="lm_head")
    refused(make_engine("bundled"), adapter, "changes lm_head, which is the table of the embedding")


def test_a_head_of_its_own_is_served(make_engine: Any, make_adapter: MakeAdapter) -> None:
    assert not preset("tiny").tie_word_embeddings
    engine, adapter = make_engine(), make_adapter(targets="lm_head")
    core, tuned = (model_of(engine, plugins).head.weight for plugins in ({}, settings(adapter)))
    exact = core + 2 * product(adapter, "lm_head")
    assert ((tuned - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all() and not torch.equal(tuned, core)


def test_without_an_adapter_the_way_out_is_named(make_engine: Any, tmp_path: Path) -> None:
    engine = make_engine()
    refused(engine, "", "lora needs an adapter: set lora.adapter", "documents", "pitlane train MODEL FILES --lora")
    refused(engine, tmp_path / "nowhere", "no such folder")
    refused(engine, tmp_path, "lacks adapter_config.json and adapter_model.safetensors")
    for path in ("a\0b", "~nobody-at-all/adapter", "a" * 5000):
        refused(engine, path, "no such folder" if path[0] == "a" and len(path) < 9 else "cannot be read")


def test_pickle_is_refused(make_engine: Any, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(make_engine(), adapter, "only pickle weights")


@pytest.mark.parametrize("key", [*UNSUPPORTED, "bias", "peft_type", "init_lora_weights"])
def test_other_adapters_are_refused_with_the_key(make_engine: Any, make_adapter: MakeAdapter, key: str) -> None:
    adapter = make_adapter(**{key: ["lm_head"] if key != "init_lora_weights" else "pissa"})
    refused(make_engine(), adapter, f"{key}", "another adapter")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"[]", "the file"),
        (b"[" * 100_000, "cannot be read"),
        (b"\xff", "cannot be read"),
        (b" " * (2**20 + 1), "at most 1,048,576 are read"),
        (b'{"peft_type": "LORA", "r": 0}', "r: "),
        (b'{"peft_type": "LORA", "r": "4"}', "r: "),
        (b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', "lora_alpha: "),
        (b'{"peft_type": "LORA", "r": 5, "lora_alpha": 8}', "has rank 4, and adapter_config.json says 5"),
        (b'{"peft_type": "LORA", "r": 4, "alpha_pattern": {"(": 1}}', "is no regular expression"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else "",
)
def test_a_damaged_config_is_named(make_engine: Any, make_adapter: MakeAdapter, content: bytes, message: str) -> None:
    adapter = make_adapter()
    (adapter / "adapter_config.json").write_bytes(content)
    refused(make_engine(), adapter, message, "adapter_config.json")


A, B = (f"base_model.model.{Q}.lora_{letter}.weight" for letter in "AB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.clear(), "holds no tensor"),
        (lambda tensors: tensors.pop(A), "has lora_B and no lora_A"),
        (lambda tensors: tensors.pop(B), "has lora_A and no lora_B"),
        (lambda tensors: tensors.update({A: tensors[A].int()}), "must be a matrix of F64, F32, F16, BF16, got I32"),
        (lambda tensors: tensors.update({A: tensors[A][0].clone()}), "must be a matrix"),
        (lambda tensors: tensors.update({A: tensors[A][:2].clone()}), "the ranks of"),
        (lambda tensors: tensors.update({f"{A}.more": tensors[A].clone()}), "only LoRA weights of linears"),
        (lambda tensors: tensors.update({"base_model.model.lm_head.weight": tensors[A].clone()}), "only LoRA weights"),
        (
            lambda tensors: tensors.update(
                {"base_model.model.model.embed_tokens.lora_embedding_A": tensors[A].clone()}
            ),
            "LoRA of embeddings",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_would_not_be_used_are_refused(
    make_engine: Any, make_adapter: MakeAdapter, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    adapter = make_adapter()
    rewrite(adapter, change)
    refused(make_engine(), adapter, message)


def test_damaged_weights_are_named(make_engine: Any, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refused(make_engine(), adapter, "cannot be read", path.name)


def test_weights_that_are_not_finite_are_refused(make_engine: Any, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    rewrite(adapter, lambda tensors: tensors[A].fill_(torch.nan))
    engine = make_engine()
    with pytest.raises(BadOption, match=f"{Q} with the adapter .* is not finite"):
        engine.generate(PROMPT, PARAMS, plan=engine.plan(settings(adapter)))
    assert engine.generate(PROMPT, PARAMS).stats["failed"] == {}
