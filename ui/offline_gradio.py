"""Gradio with everything off that sends data to other machines. Modules of the page import `gr` from here, never from gradio.

Gradio reads these environment variables while it is imported. They overrule the variables of the user.
"""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"
os.environ["GRADIO_SHARE"] = "False"

import gradio as gr

__all__ = ["gr"]
