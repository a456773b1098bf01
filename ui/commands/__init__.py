"""The commands of `pitlane`, one module each, imported when chosen. `options` and `config` are what they share."""
