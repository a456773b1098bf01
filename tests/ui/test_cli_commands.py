"""The commands beside `run` and `chat`: docs, models, plugins, memory, doctor, ui."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pitlane.kernels import linear
from pitlane.ui.cli import main
from pitlane.ui.session import EngineOptions

TINY = ("--model", "random:tiny", "--dtype", "float32")


def invoke(*args: str) -> Result:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.stderr
    return result


def loaded(*args: str) -> Any:
    return json.loads(invoke(*args, "--json").stdout)


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "harbour.txt"
    path.write_text("The harbour of Lund was closed in the spring of 1893.\n\n" * 12)
    return str(path)


# ---- docs


def test_an_added_document_is_listed_and_its_kv_is_read_back(text_file: str) -> None:
    row = loaded("docs", "add", *TINY, text_file)[0]
    assert row["title"] == "harbour.txt" and row["kv_bytes"] > 0
    assert [listed["id"] for listed in loaded("docs", "list")] == [row["id"]]
    assert "harbour.txt" in invoke("docs", "list").stdout

    stats = loaded("run", *TINY, "--max-tokens", "2", "--doc", text_file, "When?")["stats"]
    assert stats["cached_tokens"] == row["prefill"]["prompt_tokens"]
    by_id = loaded("run", *TINY, "--max-tokens", "2", "--doc", row["id"], "When?")["stats"]
    assert by_id["prompt_tokens"] == stats["prompt_tokens"]


def test_files_that_cannot_be_read_are_named_and_the_others_are_added_with_kv(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"good{number}.txt").write_text(f"Page {number} of the harbour book. " * 20)
    (tmp_path / "empty.txt").write_text("")
    files = [str(tmp_path / name) for name in ("good1.txt", "empty.txt", "good2.txt")]
    result = CliRunner().invoke(main, ["docs", "add", *TINY, *files])
    assert result.exit_code == 1
    assert "good1.txt: 1 pages" in result.stdout and "good2.txt: 1 pages" in result.stdout
    assert result.stdout.count("of KV saved") == 2
    assert "empty.txt: is empty (0 bytes)" in result.stderr
    result = CliRunner().invoke(main, ["docs", "add", "--no-prefill", "--json", *files])
    first, second, failed = json.loads(result.stdout)
    assert (first["title"], second["title"]) == ("good1.txt", "good2.txt")
    assert failed["file"] == files[1] and "is empty" in failed["error"]


def test_kv_that_cannot_be_computed_keeps_no_other_document_from_its_own(tmp_path: Path) -> None:
    for name, length in (("long", 4000), ("short", 20)):
        (tmp_path / f"{name}.txt").write_text("harbour " * length)
    files = [str(tmp_path / f"{name}.txt") for name in ("long", "short")]
    result = CliRunner().invoke(main, ["docs", "add", *TINY, *files])
    assert (
        result.exit_code == 1 and "long.txt is stored as" in result.stderr and "KV cannot be computed" in result.stderr
    )
    assert result.stdout.count("of KV saved") == 1


def test_a_copy_under_another_name_has_the_same_prompt(text_file: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text_file).read_bytes())
    first, second = (
        loaded("run", *TINY, "--max-tokens", "1", "--doc", file, "When?") for file in (text_file, str(copy))
    )
    assert second["stats"]["prompt_tokens"] == first["stats"]["prompt_tokens"]
    assert second["stats"]["cached_tokens"] > 0


def test_pinned_kv_is_not_pruned(text_file: str) -> None:
    loaded("docs", "add", *TINY, text_file)
    prefix = loaded("docs", "cache", "ls")[0]
    invoke("docs", "cache", "pin", str(prefix["id"]))
    assert loaded("docs", "cache", "prune") == {"removed": [], "freed_bytes": 0, "left_bytes": prefix["num_bytes"]}
    assert "pinned" in invoke("docs", "cache", "ls").stdout
    assert "what is left is pinned" in invoke("docs", "cache", "prune").stderr
    invoke("docs", "cache", "unpin", str(prefix["id"]))
    assert loaded("docs", "cache", "prune", "--keep", "1GB")["removed"] == []
    assert loaded("docs", "cache", "prune")["freed_bytes"] == prefix["num_bytes"]
    assert loaded("docs", "cache", "ls") == []


def test_pinning_what_is_not_there_pins_nothing_and_lists_what_is(text_file: str) -> None:
    loaded("docs", "add", *TINY, text_file)
    prefix = loaded("docs", "cache", "ls")[0]
    result = CliRunner().invoke(main, ["docs", "cache", "pin", str(prefix["id"]), "999"])
    assert result.exit_code == 2 and f"no saved prefix 999; saved are: {prefix['id']}" in result.stderr
    assert not loaded("docs", "cache", "ls")[0]["pinned"]
    listed = invoke("docs", "cache", "ls")
    assert "harbour.txt" in listed.stdout and prefix["fingerprint"][:8] in listed.stdout
    assert listed.stderr.startswith("1 saved, ")


def test_removing_a_document_removes_its_kv(text_file: str) -> None:
    loaded("docs", "add", *TINY, text_file)
    invoke("docs", "rm", "harbour.txt")
    assert loaded("docs", "list") == loaded("docs", "cache", "ls") == []


def test_without_prefill_no_model_is_loaded(text_file: str) -> None:
    row = loaded("docs", "add", "--model", "./nowhere", "--no-prefill", text_file)[0]
    assert row["kv_bytes"] == 0 and "prefill" not in row


def test_a_document_over_the_context_is_stored_and_refused(text_file: str) -> None:
    result = CliRunner().invoke(main, ["docs", "add", *TINY, "--context", "128", text_file])
    assert result.exit_code == 2
    assert "is stored as" in result.stderr and "128" in result.stderr
    assert len(loaded("docs", "list")) == 1


# ---- models, plugins, memory


def test_models_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pitlane.models import CachedModel

    cached = [CachedModel("a/b", tmp_path, 2 * 10**9, ""), CachedModel("c/d", tmp_path, 10, "is quantized")]
    monkeypatch.setattr("pitlane.models.cached_models", lambda families: cached)
    text = invoke("models", "ls").stdout
    assert "a/b" in text and "2.0 GB" in text and "ready" in text and "is quantized" in text
    assert [row["name"] for row in loaded("models", "ls")["cached"]] == ["a/b", "c/d"]
    monkeypatch.setattr("pitlane.models.remove", lambda name: 5_000_000)
    assert "freed 5.0 MB" in invoke("models", "rm", "a/b").stdout


def test_plugins_list_has_role_exactness_and_options() -> None:
    found = {row["name"]: row for row in loaded("plugins", "list")}
    lookup = found["prompt_lookup"]
    assert (lookup["role"], lookup["exactness"], lookup["status"]) == ("drafter", "identical", "ok")
    option = next(option for option in lookup["options"] if option["name"] == "num_draft_tokens")
    assert (option["type"], option["default"], option["range"]) == ("integer", 8, "[1, 64]")
    assert found["text_document"]["status"] == "always on"
    assert "prompt_lookup" in invoke("plugins", "list").stdout


def test_plugins_info_shows_options_with_ranges() -> None:
    text = invoke("plugins", "info", "prompt_lookup").stdout
    assert "[1, 64]" in text and "maximum tokens per draft" in text and "identical" in text


def test_a_plugin_that_fails_is_listed_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    found = {row["name"]: row for row in loaded("plugins", "list", "--plugins-dir", str(tmp_path))}
    assert found["broken"]["status"] == "failed" and "no_such_module" in found["broken"]["reason"]
    assert "no_such_module" in invoke("plugins", "info", "--plugins-dir", str(tmp_path), "broken").stdout


def test_plugins_list_imports_no_torch() -> None:
    code = (
        "import sys; from pitlane.ui.cli import main\n"
        "try: main(['plugins', 'list', '--json'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_memory_is_what_the_engine_takes(make_engine: Callable[..., Any]) -> None:
    needs = loaded("memory", "random:tiny", "--dtype", "float32", "--batch", "3", "--context", "1k")
    stats = make_engine(dtype="float32").generate("x").stats
    assert needs["weight_bytes"] == stats["weight_bytes"]
    shape = needs["shape"]
    assert needs["kv_bytes_per_token"] == shape["layers"] * 2 * shape["kv_heads"] * shape["head_dim"] * 4
    assert needs["kv_bytes"] == needs["kv_bytes_per_token"] * 1024 * 3
    assert needs["fits"] is True and needs["max_context"] == needs["max_position"] == 4096


@pytest.mark.parametrize("model", ["bundled", "random:llama-1b", "folder"])
def test_memory_of_a_load_reads_no_weights(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pitlane.storage.bundled

    monkeypatch.setattr("pitlane.engine.kv.memory.available", lambda device: 64 * 2**30)
    monkeypatch.setattr("pitlane.engine.loader.available", lambda device: 64 * 2**30)
    for reader in ("SafetensorsFolder", "RandomWeights"):
        monkeypatch.setattr(f"pitlane.engine.models.weights.{reader}.get", lambda *_: pytest.fail("read"))
    name = next(iter(pitlane.storage.bundled.__path__)) if model == "folder" else model
    needs = loaded("memory", name, "--context", "32k", "--batch", "8")
    assert needs["kv_bytes"] == needs["kv_bytes_per_token"] * 32768 * 8
    assert needs["kv_memory"] >= 4 * needs["kv_bytes"], "so much that one of four lanes holds the load"
    assert needs["default_kv_bytes"] <= (64 * 2**30 - needs["weight_bytes"]) // 8
    text = invoke("memory", name, "--context", "32k", "--batch", "8").stdout
    assert "--kv-memory" in text and "made for" in text


def test_kv_memory_that_memory_names_holds_the_load(make_engine: Callable[..., Any]) -> None:
    needs = loaded("memory", "random:tiny", "--dtype", "float32", "--batch", "3", "--context", "1k")
    engine = make_engine(dtype="float32", kv_memory=needs["kv_memory"])
    assert engine.lane_of(engine.default_plan).pool.num_blocks * 32 >= 3 * 1024
    assert f"weights {needs['weight_bytes'] / 2**20:.1f} MiB" in engine.loader.describe_memory()


def test_memory_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitlane.engine.kv.memory.available", lambda device: 10**9)
    needs = loaded("memory", "random:llama-8b", "--dtype", "bfloat16")
    assert needs["fits"] is False and needs["max_context"] == needs["max_batch"] == 0
    assert "does not fit" in invoke("memory", "random:llama-8b").stdout


# ---- doctor, ui


def test_doctor_reports_every_part() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    report = json.loads(result.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    names = {"pitlane", "packages", "cpu", "memory", "read bandwidth", "home", "database", "bundled model", "plugins"}
    assert names <= set(checks)
    for name in names - {"bundled model"}:
        assert checks[name]["ok"], checks[name]
    assert result.exit_code == (0 if report["ok"] else 1)
    assert "GB/s" in checks["read bandwidth"]["detail"]
    if linear.unavailable() is None:
        assert f"linear: ok by {linear.fastest_products()} products" in checks["cpu kernels"]["detail"]


def test_doctor_goes_on_when_a_part_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PITLANE_HOME", str(blocked))
    monkeypatch.setattr("pitlane.ui.commands.doctor._bundled", lambda: "skipped")
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert not checks["home"]["ok"] and "PITLANE_HOME" in checks["home"]["detail"]
    assert checks["plugins"]["ok"]


def test_ui_passes_the_options_to_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    page = ModuleType("pitlane.ui.app")
    page.launch = lambda options, **where: called.append((options, where))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pitlane.ui.app", page)
    invoke("ui", "--model", "random:tiny", "--plugins", "", "--context", "1k", "--port", "0", "--no-open")
    options = EngineOptions(model="random:tiny", plugins="", context=1024)
    assert called == [(options, {"host": "127.0.0.1", "port": 0, "open_browser": False, "password": ""})]
