"""Weights of the squared error of x_0 as functions of the log SNR, each finite where the SNR is 0.

A weight w of the error of x_0 is the weight w / SNR of the error of eps, and w / (SNR + 1) of that of v.
"""

import jax
import jax.numpy as jnp

from fooddiff.arrays import PerExample


def constant(log_snr: PerExample) -> PerExample:
    """1: the error of x_0 itself."""
    return jnp.ones_like(log_snr)


def snr(log_snr: PerExample) -> PerExample:
    """SNR: the error of eps, L_simple (DDPM eq. 14)."""
    return jnp.exp(log_snr)


def min_snr(log_snr: PerExample, *, cap: float = 5.0) -> PerExample:
    """min(SNR, cap) (Hang et al. 2023, arXiv 2303.09556, eq. 8)."""
    return jnp.exp(jnp.minimum(log_snr, jnp.log(cap)))


def capped(log_snr: PerExample, *, cap: float = 5.0) -> PerExample:
    """min(SNR + 1, cap): the error of v, capped where there is little noise."""
    return jnp.minimum(jnp.exp(log_snr) + 1, cap)


def p2(log_snr: PerExample, *, k: float = 1.0, gamma: float = 1.0) -> PerExample:
    """SNR / (k + SNR)^gamma (Choi et al. 2022, arXiv 2204.00227, eq. 8)."""
    return jnp.exp(log_snr) / (k + jnp.exp(log_snr)) ** gamma


def sigmoid(log_snr: PerExample, *, bias: float = 0.0) -> PerExample:
    """Of eps a sigmoid of bias - log SNR (Kingma, Gao 2023, arXiv 2303.00848, table 1), times the SNR."""
    return jnp.exp(bias) * jax.nn.sigmoid(log_snr - bias)


def edm(log_snr: PerExample, *, data_std: float = 0.5) -> PerExample:
    """SNR + 1 / data_std^2, which is lambda of EDM section 5."""
    return jnp.exp(log_snr) + 1 / data_std**2
