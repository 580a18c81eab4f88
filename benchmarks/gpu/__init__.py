"""The staged benchmark of a GPU, and what travels to it."""
