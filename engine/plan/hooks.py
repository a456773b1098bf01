"""The declaration of a hook, and the function that calls its implementations.

`call` is the only place that runs a plugin's hook. It times every implementation and passes its result to `check`. It turns every
error into a `HookError` that names the plugin. It knows no sequence: the caller books the times in `spent`, and passes `fail` to
handle an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from time import perf_counter
from typing import Any, Literal, NamedTuple, TypeAlias

from pitlane.engine.errors import PitlaneError, PluginFailed
from pitlane.engine.plan import trace
from pitlane.engine.plan.changes import explanation
from pitlane.engine.plan.plugin import Plugin, Role

Combine: TypeAlias = Literal["first", "all", "fold"]
Kind: TypeAlias = Literal["host", "variant", "lane", "opening", "step"]


@dataclass(frozen=True, slots=True)
class HookSpec:
    """The declaration of a hook.

    combine: first = the first result that is not None; all = every implementation is called; fold = every implementation is
    called, and gets the result of the implementation before it. folds: the argument that takes this result; None = the
    implementations change an argument in place. kind: when the hook is called: host (outside plans), variant (weights are built),
    lane (a lane is built), opening (before a plan's first request in a lane), step (while requests run). role: only a plugin of
    this role may implement the hook; None = any plugin. renamed: former names of arguments, and their names now.
    """

    name: str
    combine: Combine
    kind: Kind
    role: Role | None
    folds: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hook:
    """One plugin's implementation of one hook. arguments: names of the arguments that the implementation takes, as of now.

    pick: takes the values of these arguments out of a dict. name: of the plugin.
    """

    plugin: Plugin
    name: str
    spec: HookSpec
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    pick: Callable[[Mapping[str, Any]], tuple[Any, ...]]

    @classmethod
    def of(cls, plugin: Plugin, spec: HookSpec) -> Hook:
        function = getattr(plugin, spec.name)
        parameters = inspect.signature(function).parameters.values()
        taken = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty)
        arguments = tuple(spec.renamed.get(name, name) for name in taken)
        return cls(plugin, plugin.name, spec, function, arguments, _picker(arguments))


def _picker(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """A function that is faster than a comprehension. `itemgetter` returns a tuple for two names or more."""
    if len(names) == 1:
        (name,) = names
        return lambda values: (values[name],)
    return itemgetter(*names) if names else lambda values: ()


class HookError(Exception):
    """A plugin failed in a hook, or in a part that it built. plugin: the failed plugin."""

    def __init__(self, plugin: Plugin, where: str, cause: BaseException) -> None:
        super().__init__(f"{plugin.name}.{where}: {type(cause).__name__}: {cause}{explanation(cause)}")
        self.plugin = plugin
        self.__cause__ = cause


class Answer(NamedTuple):
    """The result of a `first` hook, and the plugin that gave it."""

    value: Any
    plugin: Plugin


Spent: TypeAlias = tuple[Hook, float]
Fail: TypeAlias = Callable[[HookError], None]
Check: TypeAlias = Callable[[Plugin, Any], Any]


def call(
    hooks: Iterable[Hook],
    spent: list[Spent] | None,
    fail: Fail,
    check: Check | None = None,
    /,
    **values: Any,
) -> Answer | None:
    """Call the implementations of one hook in order. Returns the answer of a `first` hook, or of the last plugin that
    changed the value of a `fold` hook; None if there is no answer.

    spent: gets the hook and the seconds of every call. fail(error): gets every error, and may raise; if it returns, the next
    implementation is called. check(plugin, result): checks a result that is not None, and returns the value to use. In a `fold`
    hook it gets None too: the plugin changed its argument in place.
    """
    answer: Answer | None = None
    is_traced = trace.IS_ON
    started = perf_counter()
    for hook in hooks:
        error: BaseException | None = None
        try:
            result = hook.function(*hook.pick(values))
            if check is not None and (result is not None or hook.spec.combine == "fold"):
                result = check(hook.plugin, result)
        except (Exception, SystemExit) as reason:  # a plugin that calls sys.exit() would end the engine's thread
            error, result = reason, None
        now = perf_counter()
        if spent is not None:
            spent.append((hook, now - started))
        if is_traced:
            trace.print_call(hook.plugin.name, hook.spec.name, now - started, result if error is None else error)
        started = now
        if result is None and error is None:
            continue
        if error is not None:
            if isinstance(error, PitlaneError) and hook.spec.kind != "step":
                raise error  # the caller who asked for the plan or the document gets it
            fail(HookError(hook.plugin, hook.spec.name, error))
        elif hook.spec.combine == "first":
            return Answer(result, hook.plugin)
        elif hook.spec.folds is not None:
            values[hook.spec.folds] = result
            answer = Answer(result, hook.plugin)
    return answer


def refuse(error: HookError) -> None:
    """Raise PluginFailed for a plugin that failed while a plan was prepared. The caller who asked for the plan gets it."""
    raise PluginFailed(f"{error}; take {error.plugin.name} out of the plan") from error
