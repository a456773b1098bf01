"""Pitlane's public face: the names that users and plugin authors import.

Importing this module imports neither torch nor transformers: a name is looked up in its module whenever it is used. Modules of
their own are `pitlane.models` (models on this machine and the memory they take), `pitlane.sources` (models fetched from the package
index) and `pitlane.testing` (checks for plugins).
"""

import importlib
import os
from typing import TYPE_CHECKING

from pitlane.engine.plan.changes import API_VERSION

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    # GNU OpenMP reads GOMP_SPINCOUNT when torch is imported: how many turns a thread of torch waits for its next operation before
    # it sleeps. By default it waits for milliseconds, on the core where our kernels compute: a prompt takes 1.4 times as long
    # (SmolLM2, 512 tokens, 2 cores with AVX2). With 10,000 turns, the bare core decodes as fast as by default; with none, it
    # reaches 0.8 of that.
    os.environ["GOMP_SPINCOUNT"] = "10000"

if TYPE_CHECKING:
    # isort: off
    # Ruff would write a statement for every name.
    from pitlane.engine.border import MAX_SAMPLES as MAX_SAMPLES
    from pitlane.engine.calibration.plugin import CalibratedPlugin as CalibratedPlugin
    from pitlane.engine.calibration.recipe import (
        Calibrator as Calibrator,
        InputStats as InputStats,
        LayerInputs as LayerInputs,
        LayerRecipe as LayerRecipe,
        Recipe as Recipe,
        RecipeProgress as RecipeProgress,
    )
    from pitlane.engine.calibration.text import calibration_hash as calibration_hash
    from pitlane.engine.decode.draft import Draft as Draft
    from pitlane.engine.decode.params import SamplingParams as SamplingParams
    from pitlane.engine.decode.rows import Rows as Rows
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
    from pitlane.engine.events import (
        Finished as Finished,
        PrefillProgress as PrefillProgress,
        Result as Result,
        StepStats as StepStats,
        TextDelta as TextDelta,
    )
    from pitlane.engine.kv.operations import (
        Copy as Copy,
        Load as Load,
        OperationQueue as OperationQueue,
        Save as Save,
    )
    from pitlane.engine.kv.pool import Pool as Pool
    from pitlane.engine.kv.state import (
        BLOCK_SIZE as BLOCK_SIZE,
        KVGroup as KVGroup,
        KVState as KVState,
        PrefixMatch as PrefixMatch,
        in_blocks as in_blocks,
    )
    from pitlane.engine.kv.store import DenseKV as DenseKV, KVStore as KVStore, KVStorePlan as KVStorePlan
    from pitlane.engine.kv.visibility import (
        Eviction as Eviction,
        SlidingWindow as SlidingWindow,
        Visibility as Visibility,
    )
    from pitlane.engine.models.build_context import BuildContext as BuildContext
    from pitlane.engine.models.config import DecoderConfig as DecoderConfig
    from pitlane.engine.models.decoder import Decoder as Decoder, parts_of as parts_of
    from pitlane.engine.models.families.core import CORE_FAMILIES as CORE_FAMILIES
    from pitlane.engine.models.families.family import Families as Families, Family as Family
    from pitlane.engine.models.layers import Linear as Linear
    from pitlane.engine.models.mapping import trim_heap as trim_heap
    from pitlane.engine.models.parts import (
        EmbeddingPart as EmbeddingPart,
        Feed as Feed,
        LinearPart as LinearPart,
        LinearPlan as LinearPlan,
        Member as Member,
        NormPart as NormPart,
        Part as Part,
        TensorPart as TensorPart,
        Tensors as Tensors,
    )
    from pitlane.engine.models.quantized.packing import (
        PackedTensors as PackedTensors,
        PackedWeight as PackedWeight,
        Packing as Packing,
    )
    from pitlane.engine.models.source import ModelSource as ModelSource
    from pitlane.engine.models.weight_hashes import file_hash as file_hash
    from pitlane.engine.plan.finder import (
        disable_plugin as disable_plugin,
        enable_plugin as enable_plugin,
        find_plugins as find_plugins,
    )
    from pitlane.engine.plan.plan import Plan as Plan, Settings as Settings
    from pitlane.engine.plan.planner import Planner as Planner
    from pitlane.engine.plan.plugin import (
        EXACTNESS as EXACTNESS,
        Exactness as Exactness,
        Plugin as Plugin,
        PluginOptions as PluginOptions,
        hookimpl as hookimpl,
    )
    from pitlane.engine.plan.registry import (
        PluginEntry as PluginEntry,
        PluginRegistry as PluginRegistry,
        check_roles as check_roles,
    )
    from pitlane.engine.run.attention import PlainAttention as PlainAttention, visible_keys as visible_keys
    from pitlane.engine.run.batch import Attention as Attention, Batch as Batch, GroupBatch as GroupBatch
    from pitlane.engine.run.lane import Lane as Lane
    from pitlane.engine.run.limits import Limits as Limits
    from pitlane.engine.run.runner import (
        EarlyExit as EarlyExit,
        Forward as Forward,
        ModelForward as ModelForward,
        Output as Output,
        RunnerContext as RunnerContext,
    )
    from pitlane.engine.sequence import Sequence as Sequence
    from pitlane.engine.stream import Stream as Stream
    from pitlane.engine.text.documents import load_document as load_document
    from pitlane.engine.text.prompt import Segment as Segment
    from pitlane.engine.text.tokenizer import Prompt as Prompt, Tokenizer as Tokenizer
    from pitlane.engine.worker import release_threads as release_threads
    from pitlane.storage.errors import DocumentError as DocumentError, StorageError as StorageError
    from pitlane.storage.types import Document as Document, Page as Page

_NAMES = {  # the same names at run time, when the imports above are not carried out
    "pitlane.engine.border": "MAX_SAMPLES",
    "pitlane.engine.calibration.plugin": "CalibratedPlugin",
    "pitlane.engine.calibration.recipe": "Calibrator InputStats LayerInputs LayerRecipe Recipe RecipeProgress",
    "pitlane.engine.calibration.text": "calibration_hash",
    "pitlane.engine.decode.draft": "Draft",
    "pitlane.engine.decode.params": "SamplingParams",
    "pitlane.engine.decode.rows": "Rows",
    "pitlane.engine.engine": "Engine",
    "pitlane.engine.errors": "BadOption EngineClosed ModelError ModelTooLarge PitlaneError PlanConflict PluginFailed "
    "PromptTooLong UnknownPlugin UnsupportedModel",
    "pitlane.engine.events": "Finished PrefillProgress Result StepStats TextDelta",
    "pitlane.engine.kv.operations": "Copy Load OperationQueue Save",
    "pitlane.engine.kv.pool": "Pool",
    "pitlane.engine.kv.state": "BLOCK_SIZE KVGroup KVState PrefixMatch in_blocks",
    "pitlane.engine.kv.store": "DenseKV KVStore KVStorePlan",
    "pitlane.engine.kv.visibility": "Eviction SlidingWindow Visibility",
    "pitlane.engine.models.build_context": "BuildContext",
    "pitlane.engine.models.config": "DecoderConfig",
    "pitlane.engine.models.decoder": "Decoder parts_of",
    "pitlane.engine.models.families.core": "CORE_FAMILIES",
    "pitlane.engine.models.families.family": "Families Family",
    "pitlane.engine.models.layers": "Linear",
    "pitlane.engine.models.mapping": "trim_heap",
    "pitlane.engine.models.parts": "EmbeddingPart Feed LinearPart LinearPlan Member NormPart Part TensorPart Tensors",
    "pitlane.engine.models.quantized.packing": "PackedTensors PackedWeight Packing",
    "pitlane.engine.models.source": "ModelSource",
    "pitlane.engine.models.weight_hashes": "file_hash",
    "pitlane.engine.plan.finder": "disable_plugin enable_plugin find_plugins",
    "pitlane.engine.plan.plan": "Plan Settings",
    "pitlane.engine.plan.planner": "Planner",
    "pitlane.engine.plan.plugin": "EXACTNESS Exactness Plugin PluginOptions hookimpl",
    "pitlane.engine.plan.registry": "PluginEntry PluginRegistry check_roles",
    "pitlane.engine.run.attention": "PlainAttention visible_keys",
    "pitlane.engine.run.batch": "Attention Batch GroupBatch",
    "pitlane.engine.run.lane": "Lane",
    "pitlane.engine.run.limits": "Limits",
    "pitlane.engine.run.runner": "EarlyExit Forward ModelForward Output RunnerContext",
    "pitlane.engine.sequence": "Sequence",
    "pitlane.engine.stream": "Stream",
    "pitlane.engine.text.documents": "load_document",
    "pitlane.engine.text.prompt": "Segment",
    "pitlane.engine.text.tokenizer": "Prompt Tokenizer",
    "pitlane.engine.worker": "release_threads",
    "pitlane.storage.errors": "DocumentError StorageError",
    "pitlane.storage.types": "Document Page",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)
__version__ = "0.1.0"
api_version = API_VERSION

if not TYPE_CHECKING:  # a type checker would take every misspelt name for an `Any`

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            from pitlane.engine.plan.changes import now

            if now(f"pitlane.{name}"):  # no AttributeError: `from pitlane import ...` would replace its message
                raise ImportError(f"pitlane has no name {name!r}{now(f'pitlane.{name}')}")
            raise AttributeError(f"module 'pitlane' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
