"""Pitlane's public face: what a user or a plugin author imports, and nothing else.

Names are resolved on first use, so that importing this imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pitlane.engine.decode.draft import Draft as Draft
    from pitlane.engine.decode.params import SamplingParams as SamplingParams
    from pitlane.engine.decode.rows import Rows as Rows
    from pitlane.engine.engine import Engine as Engine
    from pitlane.engine.errors import PitlaneError as PitlaneError
    from pitlane.engine.events import StepStats as StepStats
    from pitlane.engine.kv.operations import Copy as Copy
    from pitlane.engine.kv.operations import Load as Load
    from pitlane.engine.kv.operations import Save as Save
    from pitlane.engine.kv.pool import Pool as Pool
    from pitlane.engine.kv.state import KVState as KVState
    from pitlane.engine.kv.state import PrefixMatch as PrefixMatch
    from pitlane.engine.kv.store import KVStore as KVStore
    from pitlane.engine.models.build_context import BuildContext as BuildContext
    from pitlane.engine.models.layers import Linear as Linear
    from pitlane.engine.models.layers import LinearPart as LinearPart
    from pitlane.engine.plan.plugin import Plugin as Plugin
    from pitlane.engine.plan.plugin import PluginOptions as PluginOptions
    from pitlane.engine.plan.plugin import hookimpl as hookimpl
    from pitlane.engine.run.attention import Attention as Attention
    from pitlane.engine.run.attention import SpanAttention as SpanAttention
    from pitlane.engine.run.batch import Batch as Batch
    from pitlane.engine.run.batch import Query as Query
    from pitlane.engine.run.lane import Lane as Lane
    from pitlane.engine.run.lane import Limits as Limits
    from pitlane.engine.sequence import Sequence as Sequence
    from pitlane.engine.text.prompt import Segment as Segment
    from pitlane.engine.worker import release_threads as release_threads
    from pitlane.storage.errors import DocumentError as DocumentError
    from pitlane.storage.errors import StorageError as StorageError
    from pitlane.storage.types import Document as Document
    from pitlane.storage.types import Page as Page

_HOME = {
    "pitlane.engine.run.attention": ["Attention", "SpanAttention"],
    "pitlane.engine.run.batch": ["Batch", "Query"],
    "pitlane.engine.kv.operations": ["Copy", "Load", "Save"],
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
    "pitlane.engine.kv.store": ["KVStore"],
    "pitlane.engine.run.lane": ["Lane", "Limits"],
    "pitlane.engine.models.layers": ["Linear", "LinearPart"],
    "pitlane.engine.plan.plugin": ["Plugin", "PluginOptions", "hookimpl"],
    "pitlane.engine.kv.pool": ["Pool"],
    "pitlane.engine.models.build_context": ["BuildContext"],
    "pitlane.engine.decode.draft": ["Draft"],
    "pitlane.engine.kv.state": ["KVState", "PrefixMatch"],
    "pitlane.engine.decode.rows": ["Rows"],
    "pitlane.engine.decode.params": ["SamplingParams"],
    "pitlane.engine.text.prompt": ["Segment"],
    "pitlane.engine.sequence": ["Sequence"],
    "pitlane.engine.events": ["Finished", "PrefillProgress", "Result", "StepStats", "TextDelta"],
    "pitlane.engine.worker": ["release_threads"],
    "pitlane.storage.errors": ["DocumentError", "StorageError"],
    "pitlane.storage.types": ["Document", "Page"],
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pitlane' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
