"""From logits to tokens: sampling, verification of drafts, and draft models."""
