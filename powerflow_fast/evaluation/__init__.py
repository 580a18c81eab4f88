"""Measuring a model on held-out prompts, and the record that a run leaves behind."""
