import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.diffusion import weights
from fooddiff.diffusion.continuous import level_of
from fooddiff.diffusion.denoiser import Prediction, eps_error, v_error
from fooddiff.diffusion.level import add_noise, eps_from_x0

LOG_SNR = jnp.linspace(-15, 15, 31)
SNR = np.exp(np.asarray(LOG_SNR, np.float64))
EVERY = [
    (weights.constant, np.ones(31)),
    (weights.snr, SNR),
    (weights.min_snr, np.minimum(SNR, 5)),
    (weights.capped, np.minimum(SNR + 1, 5)),
    (weights.p2, SNR / (1 + SNR)),
    (weights.sigmoid, SNR / (1 + SNR)),
    (weights.edm, SNR + 4),
]


@pytest.mark.parametrize(("weight", "expected"), EVERY)
def test_each_is_its_formula_and_finite_where_there_is_no_signal(weight, expected):
    np.testing.assert_allclose(weight(LOG_SNR), expected, rtol=1e-5)
    assert jnp.isfinite(weight(jnp.array([-jnp.inf]))).all()


def test_their_parameters():
    np.testing.assert_allclose(weights.min_snr(LOG_SNR, cap=2.0), np.minimum(SNR, 2), rtol=1e-5)
    np.testing.assert_allclose(weights.capped(LOG_SNR, cap=2.0), np.minimum(SNR + 1, 2), rtol=1e-5)
    np.testing.assert_allclose(weights.p2(LOG_SNR, k=2.0, gamma=0.5), SNR / (2 + SNR) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(weights.sigmoid(LOG_SNR, bias=-1.0), SNR / (1 + SNR * np.e), rtol=1e-5)
    np.testing.assert_allclose(weights.edm(LOG_SNR, data_std=1.0), SNR + 1, rtol=1e-5)


def test_weights_of_x0_are_the_errors_of_eps_and_of_v():
    rng = np.random.default_rng(0)
    x_0, eps, predicted = (jnp.asarray(rng.normal(size=(5, 2, 2, 3)), jnp.float32) for _ in range(3))
    level = level_of(jnp.array([-6.0, -2.0, 0.0, 2.0, 6.0]))
    prediction = Prediction(predicted, eps_from_x0(level, predicted, add_noise(level, x_0, eps)), None)
    x0_mse = ((x_0 - predicted) ** 2).mean((1, 2, 3))
    eps_mse, v_mse = ((error(level, prediction, x_0, eps) ** 2).mean((1, 2, 3)) for error in (eps_error, v_error))
    np.testing.assert_allclose(weights.snr(level.log_snr) * x0_mse, eps_mse, rtol=1e-3)
    np.testing.assert_allclose(weights.capped(level.log_snr, cap=1e9) * x0_mse, v_mse, rtol=1e-3)
