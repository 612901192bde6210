"""Class-conditional image generation with diffusion models on Food-101 at 64x64, in JAX and Flax."""
