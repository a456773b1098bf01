"""From logits to tokens: sampling, verification of drafts, models that draft."""
