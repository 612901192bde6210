"""The denoising network: the UNet of IDDPM in Flax NNX, and its conversion to and from OpenAI's checkpoints.

`network` is the only module that splits and merges NNX modules; everyone else sees a flat dict of named arrays and pure
functions.
"""
