"""Gradio that sends nothing to other machines. Modules of the page import `gr` from here, never from gradio.

Gradio reads these environment variables while it is imported. They replace the values that the user has set.
"""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"
os.environ["GRADIO_SHARE"] = "False"

import gradio as gr

__all__ = ["gr"]
