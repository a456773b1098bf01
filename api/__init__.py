"""Pitlane's public face: the names that users and plugin authors import.

Importing this module imports neither torch nor transformers: a name is looked up in its module whenever it is used. Modules of
their own are `pitlane.models` (models on this machine and the memory they take) and `pitlane.testing` (checks for plugins).
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # isort: off
    # Ruff would write a statement for every name.
    from pitlane.engine.engine import Engine as Engine
    from pitlane.engine.errors import (
        BadOption as BadOption,
        EngineClosed as EngineClosed,
        ModelError as ModelError,
        ModelTooLarge as ModelTooLarge,
        PitlaneError as PitlaneError,
        PlanConflict as PlanConflict,
        PluginFailed as PluginFailed,
        PromptTooLong as PromptTooLong,
        UnknownPlugin as UnknownPlugin,
        UnsupportedModel as UnsupportedModel,
    )
    from pitlane.engine.kv.pool import Pool as Pool
    from pitlane.engine.kv.store import KVStore as KVStore
    from pitlane.engine.loader import default_settings as default_settings
    from pitlane.engine.models.layers import Linear as Linear, LinearPart as LinearPart
    from pitlane.engine.plan.plan import Plan as Plan, Planner as Planner, Settings as Settings
    from pitlane.engine.plan.plugin import (
        EXACTNESS as EXACTNESS,
        Plugin as Plugin,
        PluginOptions as PluginOptions,
        hookimpl as hookimpl,
    )
    from pitlane.engine.plan.registry import PluginEntry as PluginEntry, PluginRegistry as PluginRegistry
    from pitlane.engine.run.attention import Attention as Attention, SpanAttention as SpanAttention
    from pitlane.engine.run.batch import Batch as Batch, Copy as Copy, Load as Load, Query as Query, Save as Save
    from pitlane.engine.run.lane import Lane as Lane
    from pitlane.engine.stream import Stream as Stream
    from pitlane.engine.text.documents import load_document as load_document
    from pitlane.engine.text.tokenizer import Prompt as Prompt, Tokenizer as Tokenizer
    from pitlane.engine.types import (
        BuildContext as BuildContext,
        Draft as Draft,
        Finished as Finished,
        Limits as Limits,
        MAX_SAMPLES as MAX_SAMPLES,
        PrefillProgress as PrefillProgress,
        PrefixMatch as PrefixMatch,
        Result as Result,
        Rows as Rows,
        SamplingParams as SamplingParams,
        Segment as Segment,
        Sequence as Sequence,
        StepStats as StepStats,
        TextDelta as TextDelta,
    )
    from pitlane.engine.worker import release_threads as release_threads
    from pitlane.storage.errors import DocumentError as DocumentError, StorageError as StorageError
    from pitlane.storage.types import Document as Document, Page as Page

_NAMES = {  # the same names at run time, when the imports above are not carried out
    "pitlane.engine.engine": "Engine",
    "pitlane.engine.errors": "BadOption EngineClosed ModelError ModelTooLarge PitlaneError PlanConflict PluginFailed "
    "PromptTooLong UnknownPlugin UnsupportedModel",
    "pitlane.engine.kv.pool": "Pool",
    "pitlane.engine.kv.store": "KVStore",
    "pitlane.engine.loader": "default_settings",
    "pitlane.engine.models.layers": "Linear LinearPart",
    "pitlane.engine.plan.plan": "Plan Planner Settings",
    "pitlane.engine.plan.plugin": "EXACTNESS Plugin PluginOptions hookimpl",
    "pitlane.engine.plan.registry": "PluginEntry PluginRegistry",
    "pitlane.engine.run.attention": "Attention SpanAttention",
    "pitlane.engine.run.batch": "Batch Copy Load Query Save",
    "pitlane.engine.run.lane": "Lane",
    "pitlane.engine.stream": "Stream",
    "pitlane.engine.text.documents": "load_document",
    "pitlane.engine.text.tokenizer": "Prompt Tokenizer",
    "pitlane.engine.types": "BuildContext Draft Finished Limits MAX_SAMPLES PrefillProgress PrefixMatch Result Rows "
    "SamplingParams Segment Sequence StepStats TextDelta",
    "pitlane.engine.worker": "release_threads",
    "pitlane.storage.errors": "DocumentError StorageError",
    "pitlane.storage.types": "Document Page",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)
__version__ = "0.1.0"

if not TYPE_CHECKING:  # a type checker that sees it takes every misspelt name for an `Any`

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'pitlane' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
