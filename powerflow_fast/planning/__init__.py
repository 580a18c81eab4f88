"""Memory of a training run, and what to change where it does not fit."""
