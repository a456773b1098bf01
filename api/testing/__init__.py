"""The contract kit: it checks whether a plugin does what it declares.

`check_plugin` runs all checks of the contract on a plugin and returns a `PluginCheck`. It uses a tiny model without a download.
`first_difference`, `clearness`, `choice_gap` and `assert_only_ties_differ` compare answers. The fixtures in
`pitlane.pytest_plugin` serve the tests of plugin packages.
"""

from pitlane.testing.check import check_plugin as check_plugin
from pitlane.testing.outcome import Finding as Finding
from pitlane.testing.outcome import PluginCheck as PluginCheck
from pitlane.testing.ties import assert_only_ties_differ as assert_only_ties_differ
from pitlane.testing.ties import choice_gap as choice_gap
from pitlane.testing.ties import clearness as clearness
from pitlane.testing.ties import first_difference as first_difference

__all__ = [
    "Finding",
    "PluginCheck",
    "assert_only_ties_differ",
    "check_plugin",
    "choice_gap",
    "clearness",
    "first_difference",
]
