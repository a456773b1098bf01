"""`PITLANE_TRACE=1` prints every call of a hook: a line on standard error with the plugin, the hook, the time and the result."""

from __future__ import annotations

import os
import sys

from pitlane.engine.border import shown

IS_ON = os.environ.get("PITLANE_TRACE", "0") not in ("", "0")


def print_call(plugin: str, hook: str, seconds: float, result: object) -> None:
    """Print a line. result: what the hook returned, or the error that it raised."""
    shape = getattr(result, "shape", None)
    text = f"{type(result).__name__} {list(shape)}" if shape is not None else shown(result)
    print(f"pitlane: {plugin}.{hook} {1e3 * seconds:.3f} ms -> {text}", file=sys.stderr)
