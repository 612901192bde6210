"""Discrete variance-preserving diffusion: schedule -> process -> reverse -> losses, samplers, likelihood.

Pure functions of arrays. Nothing here knows a network, a data set, a config or a random key: the denoiser and the noise
are arguments. Equation numbers refer to

- DDPM: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models";
- IDDPM: Nichol, Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models";
- DDIM: Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models".
"""
