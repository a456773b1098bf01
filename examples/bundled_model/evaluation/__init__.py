"""Evaluation of a model and its drafter: document questions, SQuAD, plain text, open prompts, accepted drafts."""
