import jax.numpy as jnp
import numpy as np
import pytest

from fooddiff.build import WEIGHTS
from fooddiff.diffusion import weights
from fooddiff.diffusion.continuous import level_of
from fooddiff.diffusion.denoiser import Prediction, eps_error, v_error
from fooddiff.diffusion.level import add_noise, eps_from_x0

LOG_SNR = jnp.linspace(-15, 15, 31)
SNR = np.exp(np.asarray(LOG_SNR, np.float64))
EVERY = [
    ("constant", lambda snr: np.ones_like(snr)),
    ("snr", lambda snr: snr),
    ("min_snr", lambda snr: np.minimum(snr, 5)),
    ("capped", lambda snr: np.minimum(snr + 1, 5)),
    ("p2", lambda snr: snr / (1 + snr)),
    ("sigmoid", lambda snr: snr / (1 + snr)),
    ("edm", lambda snr: snr + 4),
]


def test_every_weight_has_its_formula_here():
    assert [name for name, _ in EVERY] == list(WEIGHTS)


@pytest.mark.parametrize(("name", "of_x0"), EVERY)
def test_each_is_its_formula_for_the_error_of_x0_and_finite_where_there_is_no_signal(name, of_x0):
    np.testing.assert_allclose(WEIGHTS[name](LOG_SNR), of_x0(SNR), rtol=1e-5)
    np.testing.assert_allclose(WEIGHTS[name](jnp.array([-jnp.inf])), of_x0(np.zeros(1)), atol=1e-7)


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
