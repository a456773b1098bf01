"""Everything that a user can cause, as named errors. The message says what, the value, and what to do.

PitlaneError
├── StorageError, DocumentError ...   (storage/errors.py)
├── BadOption          a setting has a value it cannot have
├── UnknownPlugin      no plugin of that name; lists the known
├── PlanConflict       two plugins cannot be in one plan, or one lacks what it requires
├── ModelError         a model cannot be found or read, or computes no numbers
│   ├── UnsupportedModel   its architecture or one of its features is not built here
│   └── ModelTooLarge      it does not fit in memory; with numbers
├── PromptTooLong      prompt and answer exceed the context or the KV memory; with both numbers
├── PluginFailed       a plugin raised while it served a request
└── EngineClosed       the engine has stopped
"""

from pitlane.storage.errors import PitlaneError as PitlaneError


class BadOption(PitlaneError):
    """A setting has a value it cannot have."""


class UnknownPlugin(PitlaneError):
    """No plugin of that name."""


class PlanConflict(PitlaneError):
    """Two plugins cannot be in one plan, or one lacks what it requires."""


class ModelError(PitlaneError):
    """A model cannot be found or read, or computes no numbers."""


class UnsupportedModel(ModelError):
    """A model's architecture, or a feature of it, is not built here."""


class ModelTooLarge(ModelError):
    """A model does not fit in memory."""


class PromptTooLong(PitlaneError):
    """Prompt and answer exceed the context or the KV memory."""


class PluginFailed(PitlaneError):
    """A plugin raised while it served a request."""


class EngineClosed(PitlaneError):
    """The engine has stopped."""
