"""Quantized checkpoints to write: layouts that other programs read, streamed part by part, resumable. Knows no plugin and no flag.

A room of its own, because `training/` imports transformers and this room needs none of it: a model of any size passes in little
memory.
"""
