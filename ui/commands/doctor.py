"""`pitlane doctor`: versions, the machine, and whether each part works. What to attach to a bug report.

Every check is on its own: one that raises is reported as failed, and the rest go on. Exit code 1 if any failed.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from pitlane.storage.errors import PitlaneError
from pitlane.ui.commands.options import as_json
from pitlane.ui.render import print_json, print_table, size

PACKAGES = ("torch", "transformers", "gradio", "safetensors", "pluggy", "pydantic", "sqlite-utils", "pypdfium2", "triton")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "i8mm", "bf16", "sve")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    detail: str


@click.command()
@as_json
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this installation and this machine."""
    checks = examine()
    if as_json:
        print_json({"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]})
    else:
        print_table(["", "check", "found"], [["ok" if c.ok else "FAILED", c.name, c.detail] for c in checks])
    if not all(check.ok for check in checks):
        ctx.exit(1)


def examine() -> list[Check]:
    """Carry out every check."""
    parts: dict[str, Callable[[], str]] = {
        "pitlane": lambda: f"{version('pitlane')} on Python {platform.python_version()}, {platform.platform()}",
        "packages": _packages,
        "cpu": _cpu,
        "gpu": _gpu,
        "memory": _memory,
        "read bandwidth": _bandwidth,
        "home": _home,
        "database": _database,
        "bundled model": _bundled,
        "plugins": _plugins,
    }
    return [_check(name, part) for name, part in parts.items()]


def _check(name: str, part: Callable[[], str]) -> Check:
    try:
        return Check(name, True, part())
    except PitlaneError as error:
        return Check(name, False, str(error))
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def _packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            if name != "triton":
                raise PitlaneError(f"{name} is not installed; run: python -m pip install --upgrade pitlane") from None
    return ", ".join(found)


def _cpu() -> str:
    import torch

    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    except OSError:  # not Linux: torch's own word has to do
        flags = set()
    features = [feature for feature in FEATURES if feature in flags] or [torch.backends.cpu.get_cpu_capability()]
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {' '.join(features)}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _memory() -> str:
    import psutil

    found = psutil.virtual_memory()
    return f"{size(found.total)}, {size(found.available)} free"


def _bandwidth() -> str:
    return f"{read_bandwidth() / 1e9:.1f} GB/s"


def read_bandwidth(num_bytes: int = 256 * 10**6, repeats: int = 5) -> float:
    """Bytes per second that all threads read from memory: the best of several sums of a large vector."""
    import torch

    values = torch.ones(num_bytes // 4)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def _home() -> str:
    from pitlane.storage.home import home

    folder = home()
    probe = folder / f".doctor-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise PitlaneError(f"{folder} cannot be written ({error.strerror}); set PITLANE_HOME to another folder") from None
    return str(folder)


def _database() -> str:
    from pitlane.storage.db import Store

    with Store() as store:
        answer = store.rows("PRAGMA quick_check")[0]
        if "ok" not in answer.values():
            raise PitlaneError(f"{store.path} is damaged: {next(iter(answer.values()))}; move it away")
        num_documents, num_bytes = len(store.documents.list()), store.prefixes.total_bytes()
        return f"{store.path}, {num_documents} documents, {size(num_bytes)} of saved KV"


def _bundled() -> str:
    from pitlane.ui.session import EngineOptions

    started = time.perf_counter()
    with EngineOptions(plugins="").build() as engine:
        from pitlane.engine.types import SamplingParams

        result = engine.generate("Hello", SamplingParams(max_tokens=8, ignore_eos=True))
    return f"{result.stats['completion_tokens']} tokens in {time.perf_counter() - started:.1f} s, loading included"


def _plugins() -> str:
    from pitlane.engine.registry import PluginRegistry

    entries = list(PluginRegistry.load())
    failed = [f"{entry.name} ({entry.source}): {entry.reason}" for entry in entries if entry.status == "failed"]
    if failed:
        raise PitlaneError("; ".join(failed))
    return ", ".join(entry.name for entry in entries)
