"""The commands of `pitlane`: a module per command, imported when the command is called. All share `options` and `config`."""
