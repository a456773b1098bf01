"""`PITLANE_TRACE=1` prints every plugin before its import, and every call of a hook with the time and the result.

The lines go to standard error. If an import ends the process, the last line names the plugin.
"""

from __future__ import annotations

import os
import sys

from pitlane.engine.border import shown

IS_ON = os.environ.get("PITLANE_TRACE", "0") not in ("", "0")


def print_load(plugin: str, source: str) -> None:
    print(f"pitlane: importing plugin {plugin} ({source})", file=sys.stderr, flush=True)


def print_call(plugin: str, hook: str, seconds: float, result: object) -> None:
    """Print a line. result: what the hook returned, or the error that it raised."""
    shape = getattr(result, "shape", None)
    text = f"{type(result).__name__} {list(shape)}" if shape is not None else shown(result)
    print(f"pitlane: {plugin}.{hook} {1e3 * seconds:.3f} ms -> {text}", file=sys.stderr)
