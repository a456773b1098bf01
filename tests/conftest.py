"""Fixtures for all tests: a home of their own, no network, small models.

Nothing a test does touches the user's home; only built-in plugins are loaded.

`--whole` and the mark `sizes` choose the size of long proofs: `-m slow` runs a sample, `-m slow --whole` the full proof. The mark
`cover` keeps a sample of the combinations of parameters in the default tier.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # models of a few thousand weights lose by threads, and stall when a core is busy
# A shell's background job ignores Ctrl-C, and the commands under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
TESTS = Path(__file__).resolve().parent
SPEED = TESTS / "speed"
SHARED = TESTS.parents[1] / "shared" / "data"
WARM_UP_OPERATIONS = 5e6  # the operations of 5 tokens of `random:tiny`
LONGEST = [  # files with the longest run time, the longest first
    "ui/test_browser.py",
    "contract/test_contract.py",
    "ui/test_browser_look.py",
    "ui/test_browser_pit.py",
    "plugins/test_kv_quant_trims.py",
    "api/test_testing.py",
    "engine/decode/test_draft_model.py",
    "plugins/test_compiled_step.py",
    "engine/text/test_documents.py",
    "plugins/test_attention_sinks.py",
    "ui/test_page_conversations.py",
    "ui/test_plugins_check.py",
    "ui/test_cli_batch.py",
    "ui/test_train_commands.py",
    "plugins/test_prefix_cache_damage.py",
]
SAMPLE_TIMEOUT, WHOLE_TIMEOUT = 1800, 7200  # seconds for a test at a slow size


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="with -m slow: run the long proofs whole, not on a sample")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by `@pytest.mark.sizes(names, default=[], sample=[...], whole=[...])`.

    The default tier runs the values of `default`. The slow tier runs `sample`, or with `--whole` the values of `whole`.
    `ids`: as for parametrize.
    """
    whole = metafunc.config.getoption("whole")
    slow = [pytest.mark.slow, pytest.mark.timeout(WHOLE_TIMEOUT if whole else SAMPLE_TIMEOUT)]

    def param(value: Any, marks: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)

    for mark in metafunc.definition.iter_markers("sizes"):
        values = [param(value, ()) for value in mark.kwargs.get("default", ())]
        values += [param(value, slow) for value in mark.kwargs["whole" if whole else "sample"]]
        metafunc.parametrize(*mark.args, values, ids=mark.kwargs.get("ids"))


class Cores:
    """A test of speed runs while no other slow test runs, though the workers of pytest-xdist share the cores.

    Consecutive tests of speed keep the lock, so they run in one go. Tests of the default tier take no lock.
    """

    def __init__(self) -> None:
        import fcntl

        self.flock, self.shared, self.alone, self.free = fcntl.flock, fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN
        self.queue, self.cores = os.open(TESTS, os.O_RDONLY), os.open(SPEED, os.O_RDONLY)
        self.keeps_lock = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # outside pytest-timeout, which would count the wait
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, Any, Any]:
        needs_all = SPEED in item.path.parents
        if not self.keeps_lock and item.get_closest_marker("slow"):
            self.flock(self.queue, self.alone)  # first come, first served: a test of speed does not starve
            self.flock(self.cores, self.alone if needs_all else self.shared)
            self.flock(self.queue, self.free)
        try:
            return (yield)
        finally:
            self.keeps_lock = needs_all and nextitem is not None and SPEED in nextitem.path.parents
            if not self.keeps_lock:
                self.flock(self.cores, self.free)


def covering(items: list[pytest.Function], strength: int) -> list[pytest.Function]:
    """The items of a test that together have every combination of the values of `strength` parameters. Greedy."""
    params = [[(name, id(value)) for name, value in item.callspec.params.items()] for item in items]
    values = [frozenset(combinations(param, strength)) for param in params]
    assert all(values), f"{items[0].originalname} has fewer than {strength} parameters"
    left, chosen = frozenset[Any]().union(*values), list[pytest.Function]()
    while left:
        best = max(range(len(items)), key=lambda index: len(values[index] & left))  # the first of the best
        chosen.append(items[best])
        left -= values[best]
    return chosen


@pytest.hookimpl(tryfirst=True)  # before pytest deselects the slow tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the combinations that `cover` leaves to the slow tier. Start the longest files and the browser first."""
    covered: dict[tuple[Path, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("cover"):
            covered.setdefault((item.path, item.originalname), []).append(item)
    for group in covered.values():
        mark = group[0].get_closest_marker("cover")
        assert mark is not None
        chosen = covering(group, *mark.args)
        for item in group:
            if item not in chosen:
                item.add_marker(pytest.mark.slow)
    ranks = {TESTS / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), item.get_closest_marker("browser") is None))


def pytest_collection_finish() -> None:
    """Leave the imported modules, over a million objects, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    # `--dist loadfile` would start with the files of most tests, and end with the long files of few tests.
    config.option.loadscopereorder = False
    if "PYTEST_XDIST_WORKER" in os.environ:
        config.pluginmanager.register(Cores())


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PITLANE_HOME in tmp; offline; no installed plugin packages; no PITLANE_* setting of the user."""
    for name in [name for name in os.environ if name.startswith("PITLANE_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "pitlane-home"
    monkeypatch.setenv("PITLANE_HOME", str(home))
    monkeypatch.setenv("PITLANE_LOAD", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    return home


@pytest.fixture(autouse=True, scope="module")
def short_warm_up(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shorten the warm-up of a lane to a few tokens: the usual warm-up takes four fifths of the start of a small engine.

    Tests of speed measure the engine as users start it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if SPEED not in request.path.parents:
            patch.setattr("pitlane.engine.loader.WARM_UP_OPERATIONS", WARM_UP_OPERATIONS)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models, PDFs and texts, where they are present."""
    if not SHARED.is_dir():
        pytest.skip("no shared test data here")
    return SHARED


@pytest.fixture
def make_engine(own_home: Path) -> Iterator[Callable[..., Any]]:
    """Engines that are closed at the end: `make_engine(model="random:tiny", dtype="float64", plugins={}, **options)`.

    plugins=None: those that are on by default; a function changes them.
    """
    from pitlane.engine.engine import Engine
    from tests.integrity import assert_integrity

    made: list[Engine] = []

    def make(model: str = "random:tiny", *, dtype: str = "float64", plugins: Any = (), **options: Any) -> Engine:
        as_given = plugins is None or callable(plugins) or isinstance(plugins, dict)
        settings = plugins if as_given else {name: {} for name in plugins}
        made.append(Engine(model, dtype=dtype, plugins=settings, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        for lane in engine.lanes.all:
            assert_integrity(lane.pool, ())


@pytest.fixture(scope="session")
def without_cache() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """For `Engine(plugins=without_cache)`: what is on by default, but nothing is known from before."""
    return lambda default: {name: options for name, options in default.items() if name != "prefix_cache"}


@pytest.fixture
def engine(make_engine: Callable[..., Any]) -> Any:
    """The bare core on a tiny random model in float64."""
    return make_engine()


@pytest.fixture
def always_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The governor asks for as many draft tokens as there is room for, up to 32: drafts do not depend on step times."""

    def numbers(governor: Any, record: Any, seqs: Any, limits: list[int]) -> list[int]:
        return [min(limit, 32) for limit in limits]

    monkeypatch.setattr("pitlane.engine.pacing.governor.Governor._numbers", numbers)


@pytest.fixture
def cut_tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A draft model for `random:tiny`: its first layer, norm and head."""
    from pitlane.engine.models import presets

    shape = replace(presets.PRESETS["tiny"], num_layers=1, windows=())
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "tiny-cut": shape})
    return "random:tiny-cut"


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Random LoRA adapters: `make_adapter(model="random:tiny", targets="_proj", rank=4, **config)` is a folder as PEFT writes it.

    targets: the linears whose names hold this text. config: keys of `adapter_config.json`.
    """
    from safetensors.torch import save_file

    from pitlane import parts_of
    from pitlane.engine.models.parts import LinearPart
    from pitlane.engine.models.registry import resolve

    def make(
        model: str = "random:tiny", targets: str = "_proj", rank: int = 4, name: str = "", seed: int = 0, **config: Any
    ) -> Path:
        folder = tmp_path / (name or f"adapter-{len(list(tmp_path.iterdir()))}")
        folder.mkdir(exist_ok=True)
        generator, tensors, source = torch.Generator().manual_seed(seed), {}, resolve(model)
        for part in parts_of(source.config):
            for member in part.members if isinstance(part, LinearPart) else ():
                if targets in member.name:
                    shapes = {"A": (rank, part.in_features), "B": (member.out_features, rank)}
                    for letter, shape in shapes.items():
                        at = f"base_model.model.{source.stored_name(member.name)}.lora_{letter}.weight"
                        tensors[at] = 0.1 * torch.randn(shape, generator=generator)
        save_file(tensors, folder / "adapter_model.safetensors")
        values = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}
        (folder / "adapter_config.json").write_text(json.dumps(values))
        return folder

    return make


@pytest.fixture
def ship_adapter(make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`ship_adapter(model="random:tiny", **options)` ships a random adapter for a model as `documents`; returns its folder."""
    from pitlane.engine.models.registry import resolve
    from pitlane.storage.adapters import DOCUMENTS, SHIPPED, ShippedAdapter

    def ship(model: str = "random:tiny", **options: Any) -> Path:
        folder = make_adapter(model, **options)
        fingerprints = frozenset({resolve(model).weights.fingerprint()})
        monkeypatch.setitem(SHIPPED, DOCUMENTS, ShippedAdapter(folder, model, fingerprints))
        return folder

    return ship


@pytest.fixture
def cut_model(tmp_path: Path) -> Callable[[Path, int], Path]:
    """Draft models for real ones: `cut_model(folder, num_layers)` is a folder with the first layers, norm and head."""
    from safetensors.torch import load_file, save_file

    def cut(folder: Path, num_layers: int) -> Path:
        target = tmp_path / f"{folder.name}-{num_layers}"
        if target.is_dir():
            return target
        target.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(folder / name, target / name)
        config = json.loads((folder / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
        tensors = load_file(folder / "model.safetensors")
        kept = [name for name in tensors if ".layers." not in name or int(name.split(".")[2]) < num_layers]
        save_file({name: tensors[name] for name in kept}, target / "model.safetensors")
        return target

    return cut
