"""Gradio, told before its import to send nothing anywhere. Page modules import `gr` from here, never from gradio itself.

The settings are in the environment because gradio reads them while it is imported; what the user set is overruled.
"""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"
os.environ["GRADIO_SHARE"] = "False"

import gradio as gr

__all__ = ["gr"]
