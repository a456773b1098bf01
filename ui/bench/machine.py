"""The environment of a measurement: machine, versions, commit. Imports torch only inside functions."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pitlane import Engine

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "i8mm", "bf16", "sve")


def machine() -> dict[str, Any]:
    """Processor, its features, threads in use, memory in bytes, GPUs."""
    import psutil
    import torch

    name, flags = _cpuinfo()
    features = [feature for feature in FEATURES if feature in flags]
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "features": features or [torch.backends.cpu.get_cpu_capability()],
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "platform": platform.platform(),
    }


def head(engine: Engine) -> dict[str, Any]:
    """The beginning of a report: the engine's model, device, dtype and plugins, and the environment."""
    facts = engine.loader.describe() | {"plugins": engine.default_plan.settings}
    return facts | {"machine": machine(), "versions": versions(), "commit": commit()}


def versions(packages: Iterable[str] = ("pitlane", "torch", "transformers")) -> dict[str, str]:
    """Versions of the packages that are installed."""
    installed = {}
    for name in packages:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """Commit of the checkout, with `+` if files were changed; None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def read_bandwidth(num_bytes: int = 256 * 10**6, repeats: int = 5) -> float:
    """Bytes per second that all threads together read from memory: the best of several sums of a large vector."""
    import torch

    values = torch.ones(num_bytes // 4)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()


def _cpuinfo() -> tuple[str, set[str]]:
    """Name and flags of the processor; without /proc, the name that Python's platform module knows, and no flags."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags.update(value.split())
    return name, flags
