"""The base of every plugin: a name, what it holds, how exact it is, and its options.

A plugin is one class with `@hookimpl` methods (engine/plan/hookspecs.py). An instance is bound to one set of options and may
serve several plans at once; what belongs to one sequence lives in `seq.state[name]`. Importing this imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import pluggy
from pydantic import BaseModel, ConfigDict, ValidationError

from pitlane.engine.errors import BadOption

if TYPE_CHECKING:
    from pitlane.engine.types import BuildContext

Exactness: TypeAlias = Literal["identical", "rounding", "approximate", "steering"]
Role: TypeAlias = Literal["drafter", "attention", "kv_store", "eviction", "linear"]

EXACTNESS: dict[Exactness, str] = {
    "identical": "the same tokens as without it, at any temperature and seed",
    "rounding": "the same function in another order of operations, within a stated error bound",
    "approximate": "aims at the same output, within a measured bound",
    "steering": "changes the output on purpose",
}

hookimpl = pluggy.HookimplMarker("pitlane")


class PluginOptions(BaseModel):
    """Options of a plugin: pydantic fields with title (the page's label), description, range; page, flags and docs use them."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Plugin:
    """Subclass it, set `name` and `exactness`, implement hooks."""

    name: ClassVar[str]
    role: ClassVar[Role | None] = None
    exactness: ClassVar[Exactness]
    stage: ClassVar[int] = 0  # order within a hook: lower first, then by name
    requires: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[str] = "1"

    class Options(PluginOptions):
        """No options."""

    def __init__(self, options: PluginOptions | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    @classmethod
    def exactness_for(cls, options: PluginOptions) -> Exactness:
        """Exactness class under these options; override where it depends on them."""
        return cls.exactness

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        """Why it cannot serve this model on this device; None if it can. What is on by default is left out where it cannot."""
        return None

    @classmethod
    def parse_options(cls, values: dict[str, Any]) -> PluginOptions:
        """Validate option values (numbers may come as text from a command line)."""
        try:
            return cls.Options.model_validate(values)
        except ValidationError as error:
            raise BadOption(_explain(cls, error)) from None

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring of the plugin's module, or of its class."""
        import sys

        doc = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
        return doc.strip().split("\n", 1)[0]

    @property
    def key(self) -> str:
        """Identity of this plugin with these options, for lanes and saved KV."""
        return f"{self.name}@{self.version}{self.options.model_dump_json()}"


def _explain(cls: type[Plugin], error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(cls.Options.model_fields) or "none"
        return f"{cls.name} has no option '{field}'; its options are: {known}"
    return f"{cls.name}.{field} = {first.get('input')!r}: {first['msg']}"
