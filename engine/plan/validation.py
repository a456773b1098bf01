"""Checks a plugin class before it is used: name, exactness, role, options, hooks, arguments, version of the face.

Knows no registry and makes no instance that runs.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any, get_args

import pluggy

from pitlane.engine.plan import hookspecs
from pitlane.engine.plan.changes import API_VERSION, now
from pitlane.engine.plan.hooks import Hook
from pitlane.engine.plan.hookspecs import SPECS
from pitlane.engine.plan.plugin import EXACTNESS, Plugin, PluginOptions, Role


class Incompatible(ValueError):
    """A plugin was written for a version of the face that this Pitlane does not have."""


def hooks_of(plugin: type[Plugin]) -> list[str]:
    """Names of the hooks that a class implements, in call order."""
    return [name for name in SPECS if hasattr(getattr(plugin, name, None), "pitlane_impl")]


def validate(plugin: Any) -> None:
    """Raise an error if a class is no valid plugin. Checks name, exactness, role, options, and the hooks' names and arguments."""
    if not (inspect.isclass(plugin) and issubclass(plugin, Plugin)):
        raise TypeError(f"{plugin!r} is not a subclass of pitlane.Plugin")
    name = getattr(plugin, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        example = re.sub(r"\W", "_", name) if isinstance(name, str) else ""
        advice = f'; write name = "{example}"' if example.isidentifier() else ""
        raise ValueError(f"{plugin.__name__}.name must be an identifier, got {name!r}{advice}")
    if getattr(plugin, "exactness", None) not in EXACTNESS:
        value = getattr(plugin, "exactness", None)
        raise ValueError(f"{name}.exactness must be one of {', '.join(EXACTNESS)}, got {value!r}")
    if plugin.role is not None and plugin.role not in get_args(Role):
        raise ValueError(f"{name}.role must be None or one of {', '.join(get_args(Role))}, got {plugin.role!r}")
    check_api(name, plugin.api_version)
    for field in ("requires", "conflicts"):
        if isinstance(getattr(plugin, field), str):
            raise TypeError(f"{name}.{field} must be a tuple of names, got a text")
        if not all(isinstance(other, str) for other in getattr(plugin, field)):
            raise TypeError(f"{name}.{field} must be a tuple of names, got {getattr(plugin, field)!r}")
    if not isinstance(plugin.stage, (int, float)):
        raise TypeError(f"{name}.stage must be a number, got {plugin.stage!r}")
    if not (inspect.isclass(plugin.Options) and issubclass(plugin.Options, PluginOptions)):
        raise TypeError(f"{name}.Options must be a subclass of PluginOptions, got {plugin.Options!r}")
    check_exactness(plugin, plugin.parse_options({}))
    _check_methods(plugin)  # type: ignore[arg-type]  # mypy takes no class for hashable


@cache
def _check_methods(plugin: type[Plugin]) -> None:
    """Check hooks and role, once for a class: this takes 4 ms, and every engine of a process loads the same classes."""
    _check_hooks(plugin)
    manager = pluggy.PluginManager("pitlane")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin.__new__(plugin), plugin.name)  # pluggy needs an object; it needs no `__init__`
    manager.check_pending()
    _check_role(plugin)


def _check_hooks(plugin: type[Plugin]) -> None:
    """Raise if a method is marked as a hook and is none, has the name of a hook and no mark, or takes unknown arguments."""
    for name in dir(plugin):
        method = getattr(plugin, name, None)
        is_marked = hasattr(method, "pitlane_impl")
        if is_marked and name not in SPECS:
            known = now(name) or f"; the hooks are: {', '.join(SPECS)}"
            raise ValueError(f"{plugin.name} has an unknown hook {name!r}{known}")
        if callable(method) and name in SPECS and not is_marked:
            raise ValueError(f"{plugin.name}.{name} has the name of a hook; write @hookimpl above it, or rename it")
        if is_marked:
            _check_arguments(plugin, name)


def _check_arguments(plugin: type[Plugin], name: str) -> None:
    known = list(inspect.signature(getattr(hookspecs, name)).parameters)
    for argument in Hook.of(plugin.__new__(plugin), SPECS[name]).arguments:
        if argument not in known:
            reason = now(f"{name}({argument})") or f"; its arguments are: {', '.join(known)}"
            raise ValueError(f"{plugin.name}.{name} has an unknown argument {argument!r}{reason}")


def _check_role(plugin: type[Plugin]) -> None:
    """Raise if a hook belongs to another role, or if the role's hook is missing."""
    implemented = [SPECS[name] for name in hooks_of(plugin)]
    for spec in implemented:
        if spec.role not in (None, plugin.role):
            raise ValueError(
                f'{plugin.name} implements {spec.name}, which needs role = "{spec.role}", and has role = {plugin.role!r}'
            )
    if plugin.role is not None and all(spec.role != plugin.role for spec in implemented):
        needed = " or ".join(spec.name for spec in SPECS.values() if spec.role == plugin.role)
        raise ValueError(f'{plugin.name} has role = "{plugin.role}" and must implement {needed}')


def check_exactness(plugin: type[Plugin], options: PluginOptions) -> None:
    """Raise ValueError unless `exactness_for` returns an exactness class."""
    exactness = plugin.exactness_for(options)
    if exactness not in EXACTNESS:
        raise ValueError(f"{plugin.name}.exactness_for returned {exactness!r}, must be one of {', '.join(EXACTNESS)}")


def check_api(name: str, version: object) -> None:
    """Raise Incompatible unless the face has this version: the same major number, and a minor number not above the face's.

    version: `Plugin.api_version`, such as "1.0"; an empty text stands for any version.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if version == "":
        return
    if match is None:
        raise ValueError(f'{name}.api_version must be a text such as "{API_VERSION}", got {version!r}')
    major, minor = map(int, API_VERSION.split("."))
    if int(match[1]) != major or int(match[2]) > minor:
        way_out = (
            "upgrade pitlane" if (int(match[1]), int(match[2])) > (major, minor) else "install a newer version of it"
        )
        raise Incompatible(
            f"{name} needs version {version} of the plugin API, and this Pitlane has {API_VERSION}; {way_out}"
        )
