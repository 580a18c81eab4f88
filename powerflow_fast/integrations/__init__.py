"""Doors into other trainers. Importing one imports no framework; using it does.

`trl`: TRL's trainers with this head. `transformers`: any causal language model with this head, and
a trainer for offline data. `verl`: LA-TB as one of its policy losses. `axolotl`: a plugin.
"""
