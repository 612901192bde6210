"""Networks as Flax NNX modules, and the names of their parameters in the checkpoints of other programs.

`network` is the only module that splits and merges NNX modules; everyone else sees a flat dict of named arrays and pure
functions.
"""
