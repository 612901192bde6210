"""Power averages that no run kept, rebuilt from those that it did."""

import jax
import numpy as np
import pytest

import fooddiff
from fooddiff import parallel
from fooddiff.commands import sample, train
from fooddiff.commands.convert import main
from fooddiff.runs.load import load_trained
from fooddiff.train.averages import PowerAverage, make_averages, power_exponent, power_name, rebuild
from tests import tiny

LENGTHS = (0.05, 0.1)
STEPS = 400


def direct(history, length):
    """The power average of a history as its definition says: each step has the integral of t^gamma over its time."""
    powers = np.arange(len(history) + 1.0) ** (power_exponent(length) + 1)
    return np.tensordot(np.diff(powers) / powers[-1], history, axes=1)


@pytest.fixture(scope="module")
def history():
    """A parameter that falls towards 1 and jitters, after each of 400 steps."""
    rng = np.random.default_rng(0)
    return 1 + np.exp(-np.arange(1, STEPS + 1) / 80) + 0.1 * rng.normal(size=STEPS)


def test_the_recursion_of_training_is_the_direct_average(history):
    for name, decay in make_averages((), warmup=False, power_lengths=LENGTHS).items():
        average = 0.0
        for step, value in enumerate(history):
            average += (1 - float(decay(step))) * (value - average)
        assert average == pytest.approx(direct(history, float(name.removeprefix("power_"))), rel=1e-5)


@pytest.mark.parametrize(("length", "tolerance"), [(0.04, 2e-3), (0.07, 2e-4), (0.15, 5e-4), (0.2, 2e-3)])
@pytest.mark.parametrize("step", [240, STEPS])
def test_a_rebuilt_average_is_the_direct_one(history, length, tolerance, step):
    stored = [PowerAverage(each, kept) for each in range(20, step + 1, 20) for kept in LENGTHS]
    coefficients, error = rebuild(PowerAverage(step, length), stored)
    rebuilt = coefficients @ [direct(history[: each.steps], each.length) for each in stored]
    assert abs(rebuilt - direct(history[:step], length)) < tolerance
    assert error < 0.04


def test_an_average_that_is_stored_is_itself():
    stored = [PowerAverage(each, kept) for each in (10, 20, 30) for kept in LENGTHS]
    coefficients, error = rebuild(PowerAverage(30, 0.1), stored)
    np.testing.assert_allclose(coefficients, np.eye(6)[5], atol=1e-7)
    assert error < 1e-6


@pytest.mark.parametrize("length", [0.02, 0.07, 0.2])
def test_what_stands_still_keeps_its_size_even_where_little_is_stored(length):
    coefficients, error = rebuild(PowerAverage(1000, length), [PowerAverage(1000, kept) for kept in LENGTHS])
    assert coefficients.sum() == pytest.approx(1, abs=1e-9)
    assert error > 0.01


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages")
    every = dict(train__checkpoint_every=1, train__steps=6, sample__every_steps=100, eval__every_steps=100)
    train.run(tiny.config(folder, ema__power_lengths=LENGTHS, **every), folder / "run")
    return folder / "run"


def load(path, **choice):
    return load_trained(path, **(dict(step=None, weights="ema") | choice), mesh=parallel.make_mesh())


@pytest.mark.slow
def test_a_file_of_any_length_is_made_of_the_checkpoints_and_used_like_a_run(run, tmp_path, capsys):
    main(["average", f"--workdir={run}", "--length=0.07", "--step=5", f"--out={tmp_path / 'a.safetensors'}"])
    assert "rebuilt from 10 averages in the 5 checkpoints on the disk (steps 1 to 5)" in capsys.readouterr().err
    found = load(tmp_path / "a.safetensors")
    assert (found.step, found.weights) == (5, "power_0.07")
    assert found.config.data.cache_dir != load(run).config.data.cache_dir  # a file is for others, too
    histories = [load(run, step=step, weights="raw").params for step in range(1, 6)]
    for name, value in found.params.items():
        expected = direct(np.stack([np.asarray(params[name], np.float64) for params in histories]), 0.07)
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=2e-5)

    assert fooddiff.load(tmp_path / "a.safetensors").sample(classes=["3"]).shape == (1, 8, 8, 3)
    sample.run(
        tmp_path / "a.safetensors", step=None, weights="ema", classes=("3",), per_class=1, spec={}, seed=0,
        batch_size=2, single_files=False, out=None,
    )  # fmt: skip
    assert len(list((tmp_path / "a" / "samples").glob("step_0000005_power_0.07_*.npz"))) == 1


@pytest.mark.slow
def test_stored_averages_are_weights_like_others(run):
    stored = load(run, weights=power_name(0.05))
    assert stored.weights == "power_0.05"
    histories = [load(run, step=step, weights="raw").params for step in range(1, 7)]
    expected = jax.tree.map(lambda *values: direct(np.stack(values).astype(np.float64), 0.05), *histories)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), dict(stored.params), expected)
    with pytest.raises(ValueError, match=r"expected raw, ema_0\.995, power_0\.05, power_0\.1"):
        load(run, weights="power_0.07")


@pytest.mark.slow
def test_what_cannot_be_rebuilt_is_said(run, tmp_path, capsys):
    (tmp_path / "there.safetensors").touch()
    for flags, message in [
        (["--length=0.4"], "--length is 0.4, expected a number in [0.001, 0.28]"),
        (["--length=0.2", "--step=1"], "the 1 checkpoints up to step 1 on the disk miss"),
        (["--length=0.07", "--step=9"], "no checkpoint of step 9"),
        (["--length=0.07", f"--out={tmp_path / 'a.pt'}"], "expected a name that ends in .safetensors"),
        (["--length=0.07", f"--out={tmp_path / 'there.safetensors'}"], "already exists"),
        (["--length=0.07", f"--workdir={tmp_path}"], "no run in"),
    ]:
        with pytest.raises(SystemExit):
            main(["average", f"--workdir={run}", f"--out={tmp_path / 'b.safetensors'}", *flags])
        assert message in " ".join(capsys.readouterr().err.split())
