"""Doors into other trainers. Importing one imports no framework; using it does.

`trl`: TRL's trainers with this head, `install_head`. `transformers`: any causal language model with
this head, `patch_head` and `unpatch_head` (its output is a `FusedHeadOutput`), and a trainer for
offline data, `LATBTrainer`. `verl`: LA-TB as one of its policy losses, `register`, which importing
`verl_plugin` calls. `axolotl`: a plugin, `PowerFlowPlugin`.
"""
