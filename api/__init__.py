"""Pitlane's public face: what a user or a plugin author imports, and nothing else.

Names are resolved on first use, so that importing this imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pitlane.engine.batch import Batch as Batch, Copy as Copy, Load as Load, Save as Save
    from pitlane.engine.engine import Engine as Engine
    from pitlane.engine.errors import PitlaneError as PitlaneError
    from pitlane.engine.models.layers import Linear as Linear, LinearPart as LinearPart
    from pitlane.engine.plugin import Plugin as Plugin, PluginOptions as PluginOptions, hookimpl as hookimpl
    from pitlane.engine.pool import Pool as Pool
    from pitlane.engine.types import (
        BuildContext as BuildContext,
        Draft as Draft,
        Limits as Limits,
        PrefixMatch as PrefixMatch,
        Rows as Rows,
        SamplingParams as SamplingParams,
        Segment as Segment,
        Sequence as Sequence,
        StepStats as StepStats,
    )
    from pitlane.storage.errors import DocumentError as DocumentError, StorageError as StorageError
    from pitlane.storage.types import Document as Document, Page as Page

_HOME = {
    "pitlane.engine.batch": ["Batch", "Copy", "Load", "Save"],
    "pitlane.engine.engine": ["Engine"],
    "pitlane.engine.errors": [
        "BadOption",
        "EngineClosed",
        "ModelError",
        "ModelTooLarge",
        "PitlaneError",
        "PlanConflict",
        "PluginFailed",
        "PromptTooLong",
        "UnknownPlugin",
        "UnsupportedModel",
    ],
    "pitlane.engine.models.layers": ["Linear", "LinearPart"],
    "pitlane.engine.plugin": ["Plugin", "PluginOptions", "hookimpl"],
    "pitlane.engine.pool": ["Pool"],
    "pitlane.engine.types": [
        "BuildContext",
        "Draft",
        "Finished",
        "Limits",
        "PrefillProgress",
        "PrefixMatch",
        "Result",
        "Rows",
        "SamplingParams",
        "Segment",
        "Sequence",
        "StepStats",
        "TextDelta",
    ],
    "pitlane.storage.errors": ["DocumentError", "StorageError"],
    "pitlane.storage.types": ["Document", "Page"],
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)  # noqa: PLE0605
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pitlane' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
