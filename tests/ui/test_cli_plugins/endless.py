"""Endless: letters only, slowly, so that no answer ends by itself before a test can interrupt it."""

import time

import torch

from pitlane import Plugin, hookimpl


class Endless(Plugin):
    name, exactness = "endless", "steering"

    @hookimpl
    def adjust_logits(self, rows):
        time.sleep(0.005)
        letters = torch.full_like(rows.logits, -1e9)
        letters[:, 97:123] = rows.logits[:, 97:123]
        return letters
