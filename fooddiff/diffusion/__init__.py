"""Gaussian diffusion: levels of noise -> denoiser -> guidance -> losses, samplers, likelihood.

Pure functions of arrays. Nothing here knows a network, a data set, a config or a random key: the network and the noise
are arguments. Two modules make levels, `discrete` (T steps with tables, as the reference has them) and `continuous`
(any log SNR); whatever uses levels knows neither. Equation numbers refer to

- DDPM: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models";
- IDDPM: Nichol, Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models";
- DDIM: Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models";
- EDM: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models";
- VDM: Kingma et al. 2021, "Variational Diffusion Models".
"""
