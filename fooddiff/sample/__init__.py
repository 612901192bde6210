"""Sampling: sample ids in, uint8 images and labelled grids out."""
