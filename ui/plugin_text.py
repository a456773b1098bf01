"""Plugin settings from text: the value of `--plugins` and of `/plugins`, and options as `plugin.key=value`.

Only the engine decides whether the settings make a plan; here two plugins of one role are refused, because
the second would silently replace the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pitlane import BadOption

if TYPE_CHECKING:
    from pitlane import BuildContext, Plugin, PluginRegistry, Settings


class Replacement(NamedTuple):
    """`new` took the place of `old`: both have this role, and a plan has one plugin per role."""

    new: str
    old: str
    role: str

    def __str__(self) -> str:
        slot = self.role if self.role == "drafter" else f"plugin of the role {self.role}"
        return f"{self.new} replaces {self.old}; a plan has one {slot}"


class ParsedSettings(NamedTuple):
    """The settings that a text asks for, and the plugins that it replaced without naming them."""

    settings: Settings
    replaced: tuple[Replacement, ...]


def parse_settings(
    text: str | None, options: Sequence[str], default: Settings, registry: PluginRegistry
) -> ParsedSettings:
    """Parse the text of a plugin set. `default` is not changed.

    text: `a,b` means exactly these plugins; `+a,-b` changes the default, and `+a` replaces any holder of its role; `''` means
    no plugin; None the default. options: `plugin.key=value`. Raises BadOption, UnknownPlugin, or PlanConflict if the text names
    two plugins of one role.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    changes = [name for name in names if name[0] in "+-"]
    if changes and len(changes) < len(names):
        raise BadOption(f"--plugins {text!r} mixes names with +name and -name; write either a list or changes")
    removed = [registry.get(name[1:]) for name in names if name[0] == "-"]
    added = [registry.get(name.removeprefix("+")) for name in names if name[0] != "-"]
    for plugin in added:
        if plugin in removed:
            raise BadOption(f"--plugins {text!r} both adds and removes {plugin.name}; keep one of the two")
    from pitlane import check_roles  # imports pydantic, which `--help` and lists do not need

    check_roles(added)
    is_list = text is not None and not changes
    settings = {} if is_list else {name: dict(values) for name, values in default.items()}
    for plugin in removed:
        settings.pop(plugin.name, None)
    replaced = [replacement for plugin in added for replacement in _add(settings, plugin, registry)]
    for option in options:
        _set_option(settings, option)
    return ParsedSettings(settings, tuple(replaced))


def unavailable(plugin: type[Plugin], context: BuildContext) -> str | None:
    """Why a plugin cannot serve a model, also if the plugin's own check fails; None if it can."""
    try:
        return plugin.unavailable(context)
    except Exception as error:
        return f"its check failed: {type(error).__name__}: {error}"


def _add(settings: dict[str, dict[str, Any]], plugin: type[Plugin], registry: PluginRegistry) -> list[Replacement]:
    """Add a plugin in the place of the holder of its role."""
    role = plugin.role
    holders = [name for name in settings if role and name != plugin.name and registry.get(name).role == role]
    for name in holders:
        del settings[name]
    settings.setdefault(plugin.name, {})
    return [Replacement(plugin.name, name, role) for name in holders if role]


def _set_option(settings: dict[str, dict[str, Any]], option: str) -> None:
    target, equals, value = option.partition("=")
    name, dot, key = target.partition(".")
    if not (equals and dot and name and key):
        raise BadOption(f"option {option!r} is not of the form plugin.key=value")
    if name not in settings:
        raise BadOption(f"option {option!r}: plugin {name} is not in the plan ({', '.join(settings) or 'empty'})")
    settings[name][key] = value
