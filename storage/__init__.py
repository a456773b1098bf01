"""The data that Pitlane keeps between runs: documents, saved prefixes, conversations and runs.

They lie in SQLite and safetensors files; open them with `storage.db.Store`. Imports no other room of the project, and
torch only when tensors are read or written.
"""
