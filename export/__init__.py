"""Writes quantized checkpoints in formats of other programs, part by part. A killed run can resume. Knows no plugin and no flag.

This folder is not part of `training/`, because `training/` imports transformers. Export does not need transformers, and the memory
that it needs does not grow with the number of layers.
"""
