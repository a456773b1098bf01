"""What Pitlane keeps between runs: documents, saved prefixes, conversations and runs, in SQLite and safetensors files.

Imports nothing of the project and no torch at import; `storage.db.Store` is the way in.
"""
