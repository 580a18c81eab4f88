"""How log-probs and their gradients are computed. Nothing here is public."""
