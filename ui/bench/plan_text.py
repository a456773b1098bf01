"""Plans from text: the value of `--plan`.

`core` is the plan without plugins, `default` the default plan. Any other set is written as for `--plugins`; options of plugins may
follow it, with spaces between: `+prompt_lookup prompt_lookup.num_draft_tokens=4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pitlane import BadOption
from pitlane.ui.plugin_text import ParsedSettings, parse_settings

if TYPE_CHECKING:
    from pitlane import PluginRegistry, Settings

CORE, DEFAULT = "core", "default"


def parse_plan(text: str, default: Settings, registry: PluginRegistry, options: Sequence[str] = ()) -> ParsedSettings:
    """The settings of one `--plan`. options: texts `plugin.key=value` for the plans that hold the plugin.

    Raises BadOption, UnknownPlugin or PlanConflict.
    """
    words = text.split()
    names = words.pop(0) if words and "=" not in words[0] else DEFAULT if words else CORE
    plugins = {CORE: "", DEFAULT: None}.get(names, names)
    chosen = parse_settings(plugins, (), default, registry).settings
    shared = [option for option in options if option.partition(".")[0] in chosen]
    return parse_settings(plugins, [*shared, *words], default, registry)


def parse_plans(
    texts: Sequence[str], default: Settings, registry: PluginRegistry, options: Sequence[str] = ()
) -> dict[str, ParsedSettings]:
    """The settings of all plans by label. A text that is given again gets a number: a plan may be compared with itself."""
    plans: dict[str, ParsedSettings] = {}
    for text in texts:
        name = " ".join(text.split()) or CORE
        number = sum(label == name or label.startswith(f"{name} #") for label in plans)
        plans[f"{name} #{number + 1}" if number else name] = parse_plan(text, default, registry, options)
    for option in options:
        plugin = option.partition(".")[0]
        if not any(plugin in plan.settings for plan in plans.values()):
            raise BadOption(f"option {option!r}: no plan holds {plugin}; add it to a --plan")
    return plans
