"""One named error for each failure that a user can cause. Its message says what failed, shows the value, and says what to do.

PitlaneError
├── StorageError, DocumentError ...   (storage/errors.py)
├── BadOption          a setting has a value that is not allowed
├── UnknownPlugin      no plugin has this name; the message lists the known names
├── PlanConflict       two plugins cannot be in one plan, or a plugin lacks a plugin that it requires
├── ModelError         a model cannot be found or read, or its logits are not finite
│   ├── UnsupportedModel   the engine does not support the model's architecture or one of its features
│   └── ModelTooLarge      the model does not fit in memory; the message shows both sizes
├── PromptTooLong      the prompt is empty, or prompt and answer exceed the context or the KV memory; the message shows the numbers
├── PluginFailed       a plugin raised while it started, built a lane or served a request
└── EngineClosed       the engine has stopped
"""

from pitlane.storage.errors import PitlaneError as PitlaneError


class BadOption(PitlaneError):
    """A setting has a value that is not allowed."""


class UnknownPlugin(PitlaneError):
    """No plugin has this name."""


class PlanConflict(PitlaneError):
    """Two plugins cannot be in one plan, or a plugin lacks a plugin that it requires."""


class ModelError(PitlaneError):
    """A model cannot be found or read, or its logits are not finite."""


class UnsupportedModel(ModelError):
    """The engine does not support the model's architecture or one of its features."""


class ModelTooLarge(ModelError):
    """A model does not fit in memory."""


class PromptTooLong(PitlaneError):
    """The prompt is empty, or prompt and answer exceed the context or the KV memory."""


class PluginFailed(PitlaneError):
    """A plugin raised while it started, built a lane or served a request."""


class EngineClosed(PitlaneError):
    """The engine has stopped."""
