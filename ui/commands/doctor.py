"""`pitlane doctor`: versions, the machine, and whether every part works. Attach its output to a bug report.

Checks are independent: a check that raises is reported as failed, and the next check goes on. Exit code 1 if a check failed.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version

import click

from pitlane import SamplingParams
from pitlane.storage.errors import PitlaneError, reason_of
from pitlane.ui.bench.machine import machine, read_bandwidth, versions
from pitlane.ui.commands.options import as_json
from pitlane.ui.render import print_json, print_table, size

PACKAGES = ("torch", "transformers", "gradio", "safetensors", "pluggy", "pydantic", "sqlite-utils", "pypdfium2")
PROBE_BYTES = 1 << 16  # an empty file fits even on a full disk


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
        print_table(["", "check", "result"], [["ok" if c.ok else "FAILED", c.name, c.detail] for c in checks])
    if not all(check.ok for check in checks):
        ctx.exit(1)


def examine() -> list[Check]:
    """Carry out every check."""
    parts: dict[str, Callable[[], str]] = {
        "pitlane": lambda: f"{version('pitlane')} on Python {platform.python_version()}, {platform.platform()}",
        "packages": _packages,
        "cpu": _cpu,
        "cpu kernels": _kernels,
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
    installed = versions(PACKAGES)
    missing = [name for name in PACKAGES if name not in installed]
    if missing:
        raise PitlaneError(f"not installed: {', '.join(missing)}; run: python -m pip install --upgrade pitlane")
    return ", ".join(f"{name} {number}" for name, number in installed.items())


def _cpu() -> str:
    facts = machine()
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {' '.join(facts['features'])}"


def _kernels() -> str:
    from pitlane.kernels import attention, linear, ops, quantized

    reasons = {"linear": linear.unavailable(), "attention": attention.unavailable(64), "ops": ops.unavailable()}
    states = {name: reason or "ok" for name, reason in reasons.items()}
    if linear.unavailable() is None:
        states["linear"] += f" by {linear.fastest_products()} products"
    forms = {"int8": quantized.Format(8), "int4": quantized.Format(4, group_size=32, symmetric=False)}
    states |= {name: quantized.state(form) for name, form in forms.items()}
    return ", ".join(f"{name}: {state}" for name, state in states.items())


def _gpu() -> str:
    return ", ".join(machine()["gpus"]) or "none"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{size(memory.total)}, {size(memory.available)} free"


def _bandwidth() -> str:
    return f"{read_bandwidth() / 1e9:.1f} GB/s"


def _home() -> str:
    from pitlane.storage.home import home

    folder = home()
    probe = folder / f".doctor-{os.getpid()}"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        raise PitlaneError(
            f"{folder} cannot be written ({reason_of(error)}); set PITLANE_HOME to another folder"
        ) from None
    finally:
        probe.unlink(missing_ok=True)
    return str(folder)


def _database() -> str:
    from pitlane.storage.db import Store

    with Store() as store:
        answer = store.rows("PRAGMA quick_check")[0]
        if "ok" not in answer.values():
            raise PitlaneError(f"{store.path} is damaged: {next(iter(answer.values()))}; move it away")
        num_documents, num_bytes = len(store.documents.list()), store.prefixes.total_bytes()
        return f"{store.path}, {num_documents} document{'s' * (num_documents != 1)}, {size(num_bytes)} of saved KV"


def _bundled() -> str:
    from pitlane.ui.session import EngineOptions

    started = time.perf_counter()
    with EngineOptions(plugins="").build() as engine:
        result = engine.generate("Hello", SamplingParams(max_tokens=8, ignore_eos=True))
    return f"{result.stats['completion_tokens']} tokens in {time.perf_counter() - started:.1f} s, loading included"


BROKEN = ("failed", "incompatible")


def _plugins() -> str:
    from pitlane import PluginRegistry

    entries = list(PluginRegistry.load())
    failed = [f"{entry.name} ({entry.source}): {entry.reason}" for entry in entries if entry.status in BROKEN]
    if failed:
        raise PitlaneError("; ".join(failed))
    return ", ".join(entry.name for entry in entries)
