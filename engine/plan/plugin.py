"""The base of every plugin: its name, role, exactness and options.

A plugin is one class with `@hookimpl` methods (engine/plan/hookspecs.py). An instance is bound to one set of options and may
serve several plans at once. State of a sequence lives in `seq.state[name]`; state that outlives the options lives in
`lane.state[name]`. Importing this module imports no torch.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args, get_origin

import pluggy
from pydantic import BaseModel, ConfigDict, ValidationError

from pitlane.engine.errors import BadOption

if TYPE_CHECKING:
    from pitlane.engine.models.build_context import BuildContext

Exactness: TypeAlias = Literal["identical", "rounding", "approximate", "steering"]
Role: TypeAlias = Literal["drafter", "attention", "linear", "kv_store", "eviction"]

EXACTNESS: dict[Exactness, str] = {
    "identical": "the same tokens as without the plugin, at any temperature and seed",
    "rounding": "the same function in another order of operations, within a stated error bound",
    "approximate": "aims at the same output, within a measured bound",
    "steering": "changes the output on purpose",
}

hookimpl = pluggy.HookimplMarker("pitlane")


class PluginOptions(BaseModel):
    """Options of a plugin, as pydantic fields. Page, flags and docs show their title, description and range."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Plugin:
    """Subclass it, set `name` and `exactness`, implement hooks.

    role: a plan has at most one plugin of a role. is_default: in the default plan; only for built-in plugins.
    api_version: the version of the face that the plugin was written for (`pitlane.api_version`); write it as a text, because it is
    read before the module is imported. With another major version, or with a higher minor version, the plugin does not load.
    former_names: names that the plugin had; settings may still use them, with a warning.
    batch_invariant: in every part that the plugin builds, the result of a row does not depend on other rows of the batch.
    """

    name: ClassVar[str]
    role: ClassVar[Role | None] = None
    exactness: ClassVar[Exactness]
    stage: ClassVar[int] = 0  # order within a hook: lower first, then by name
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    former_names: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[str] = "1"
    api_version: ClassVar[str] = ""
    is_default: ClassVar[bool] = False
    batch_invariant: ClassVar[bool] = False

    class Options(PluginOptions):
        """No options."""

    def __init__(self, options: PluginOptions | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @classmethod
    def exactness_for(cls, options: PluginOptions) -> Exactness:
        """Return the exactness class under these options. Override it if the class depends on the options."""
        return cls.exactness

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        """Return the reason if the plugin cannot serve this model on this device, else None.

        With a reason, the plugin is not in the default plan.
        """
        return None

    @classmethod
    def is_default_for_documents(cls, context: BuildContext) -> bool:
        """Whether the plugin, with its default options, is in the default plan of questions about a document.

        Only for built-in plugins that were made for documents and for the model of `context`, such as an adapter. `is_default`
        is for plugins that serve every question.
        """
        return False

    def refusal(self, context: BuildContext) -> str | None:
        """Return the reason if this instance, with its options, cannot serve a model, else None.

        Called once, before any weight is read. Override it if the options name files that must fit the model.
        """
        return None

    def prepare(self, context: BuildContext) -> None:
        """Make the files that the weights need, such as a recipe (`context.calibrator`), if they are missing.

        Called before a model is built under a plan with this plugin, and before its parts are planned, never on the engine's
        thread. May take minutes. `pitlane memory` plans parts without this call.
        """

    def close(self) -> None:
        """Release the resources of this instance. Called once: after its last plan is gone, or when the engine closes.

        Parts that the instance built may still run, and its `reclaim_blocks` may still be called, while a lane has them.
        """

    @classmethod
    def parse_options(cls, values: dict[str, Any]) -> PluginOptions:
        """Check option values; a command line may give numbers as text."""
        try:
            return cls.Options.model_validate({name: _number(cls, name, value) for name, value in values.items()})
        except ValidationError as error:
            raise BadOption(_explain(cls, error)) from None

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring of the plugin's module, or of its class."""
        import sys

        doc = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
        return doc.strip().split("\n", 1)[0]

    @cached_property
    def key(self) -> str:
        """Identity of this plugin with these options, for lanes and saved KV. It stays while the instance lives."""
        return self.key_of(self.options)

    @classmethod
    def key_of(cls, options: PluginOptions) -> str:
        """The key of an instance with these options. If the options name files, override it and add `file_hash` of every file."""
        return f"{cls.name}@{cls.version}{options.model_dump_json()}"


def _number(cls: type[Plugin], name: str, value: Any) -> Any:
    """The number that a text spells, if the option is one of several numbers; pydantic takes no text for those."""
    field = cls.Options.model_fields.get(name)
    allowed = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return next((number for number in allowed if isinstance(value, str) and str(number) == value), value)


def _explain(cls: type[Plugin], error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(cls.Options.model_fields) or "none"
        return f"{cls.name} has no option '{field}'; its options are: {known}"
    return f"{cls.name}.{field} = {first.get('input')!r}: {first['msg']}"
