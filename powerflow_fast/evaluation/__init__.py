"""What a model is worth on held-out prompts, and what a run leaves behind."""
