"""`python -m fooddiff.eval bpd`: what it writes, what it depends on and what it refuses."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from fooddiff import build, parallel
from fooddiff.codec import to_signed
from fooddiff.commands import likelihood
from fooddiff.commands.eval import main
from fooddiff.convert import importing
from fooddiff.diffusion.denoiser import clipped
from fooddiff.diffusion.discrete import transitions
from fooddiff.diffusion.likelihood import bits_per_dim
from fooddiff.keys import sample_noise, stream
from fooddiff.runs.load import load_trained
from tests import tiny
from tests.openai_files import write_random_pt

pytestmark = pytest.mark.slow  # all of them draw the levels of a whole model

TIMESTEPS = 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def run(workspace):
    """A workdir whose model sees the digits' labels."""
    config = tiny.config(workspace)
    write_random_pt(workspace / "tiny.pt", config)
    importing.import_openai(workspace / "tiny.pt", workspace / "run", config, None)
    return workspace / "run"


def bpd(run, out, **changes):
    settings = dict(
        step=None, weights="ema", split="test", count=20, batch_size=8, seed=0, data_path=None, cache_dir=None, out=out,
            stop_if_asked=lambda: None,
    )  # fmt: skip
    likelihood.run(run, **(settings | changes))
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def record(run, workspace):
    return bpd(run, workspace / "record.json")


def test_the_record_says_everything_that_the_number_depends_on(run, record):
    assert record["n"] == 20
    assert record["n_per_class"] == [2] * 10
    assert (record["step"], record["weights"], record["seed"], record["clip"]) == (0, "ema_0.995", 0, True)
    assert record["data"] == {
        "source": "digits", "split": "test",
        "sha256": build.make_dataset(load_trained(
            run, step=None, weights="raw", mesh=parallel.make_mesh()).config, "test").manifest["sha256"],
    }  # fmt: skip
    assert record["config"]["diffusion"]["timesteps"] == TIMESTEPS
    assert record["origin"]["file"] == "tiny.pt"
    assert "jax" in record["versions"]


def test_the_number_is_the_sum_of_its_terms(record):
    assert [len(record[name]) for name in ("vb", "x0_mse", "eps_mse")] == [TIMESTEPS] * 3
    np.testing.assert_allclose(record["bits_per_dim"], record["prior"] + sum(record["vb"]), rtol=1e-12)
    assert record["standard_error"] > 0


def test_terms_are_those_of_each_image_with_its_own_label_and_noise(run, record, workspace):
    trained = load_trained(run, step=None, weights="ema", mesh=parallel.make_mesh())
    model, key = trained.model, jax.random.key(0)
    dataset = build.make_dataset(trained.config, "test")
    rows = likelihood.balanced_rows(dataset.labels, 20)

    @jax.jit
    def one(x_0, y, row):
        ids = jax.numpy.stack([y, row])[None]
        return bits_per_dim(
            clipped(model.denoiser(partial(model.network.apply, trained.params))), transitions(model.process),
            x_0[None], lambda t: sample_noise(stream(key, "likelihood", t), ids, model.codec.shape), {"y": y[None]},
        )  # fmt: skip

    images = [one(to_signed(dataset.images[row]), dataset.labels[row], np.int32(row)) for row in rows]
    totals = np.array([float(image.total[0]) for image in images])
    np.testing.assert_allclose(record["bits_per_dim"], totals.mean(), rtol=1e-5)
    np.testing.assert_allclose(record["standard_error"], totals.std(ddof=1) / np.sqrt(20), rtol=1e-4)
    np.testing.assert_allclose(record["vb"], np.mean([image.vb[0] for image in images], axis=0), rtol=1e-4)


def test_the_batch_size_changes_nothing_but_rounding(run, record, tmp_path):
    other = bpd(run, tmp_path / "other.json", batch_size=3)  # rounded up to 4
    for name in ("bits_per_dim", "standard_error", "prior", "vb", "x0_mse", "eps_mse"):
        np.testing.assert_allclose(other[name], record[name], rtol=1e-5)
    assert {name for name in record if other[name] != record[name]} <= {
        "bits_per_dim", "standard_error", "prior", "vb", "x0_mse", "eps_mse",
    }  # fmt: skip


def test_the_command_writes_into_the_workdir(run, capfd):
    main(["bpd", f"--workdir={run}", "--weights=raw", "--split=train", "--count=1", "--seed=3", "--batch_size=8"])
    (path,) = (run / "eval").iterdir()
    assert path.name.startswith("bpd_step_0000000_raw_train_n1_seed3_")
    assert json.loads(path.read_text())["standard_error"] is None  # of one image
    assert str(path) in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(count=0), "--count is 0, expected at least 1"),
        (dict(count=10**6), r"1000000 images are asked for, but the split has \d+"),
        (dict(batch_size=0), "--batch_size is 0"),
        (dict(split="val"), "no split 'val'"),
        (dict(weights="ema_0.5"), "no weights 'ema_0.5'"),
    ],
)
def test_bad_requests_are_named_and_write_nothing(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        bpd(run, tmp_path / "out.json", **changes)
    assert not list(tmp_path.iterdir())


def test_the_data_may_have_moved(run, tmp_path, record):
    assert bpd(run, tmp_path / "out.json", cache_dir=str(tmp_path / "cache"), count=20) == record | {
        "config": record["config"] | {"data": record["config"]["data"] | {"cache_dir": str(tmp_path / "cache")}}
    }


def test_data_with_other_classes_are_refused(workspace, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    importing.import_openai(workspace / "tiny.pt", tmp_path / "letters", tiny.config(workspace), tmp_path / "names.txt")
    with pytest.raises(ValueError, match=r"0, 1, 2, ... instead of a, b, c, ..."):
        bpd(tmp_path / "letters", tmp_path / "out.json")


def test_a_bound_that_is_not_finite_is_not_written(run, tmp_path, monkeypatch):
    bound = likelihood.make_bound

    def broken(*args, **kwargs):
        return lambda *inputs: jax.tree.map(lambda term: term.at[0].set(np.nan), bound(*args, **kwargs)(*inputs))

    monkeypatch.setattr(likelihood, "make_bound", broken)
    with pytest.raises(ValueError, match="the bound of 3 of 20 images is not finite"):
        bpd(run, tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_spread_over_the_classes_and_nested(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 40).astype(np.int32)
    labels[labels == 2] = 3  # a class without images
    sizes = np.bincount(labels, minlength=4)
    for count in range(1, 40):
        rows, more = likelihood.balanced_rows(labels, count), likelihood.balanced_rows(labels, count + 1)
        assert len(set(rows)) == count
        assert set(rows) < set(more)
        taken = np.bincount(labels[rows], minlength=4)
        open_classes = taken[taken < sizes]
        assert not len(open_classes) or taken.max() - open_classes.min() <= 1
        for y in range(4):
            np.testing.assert_array_equal(rows[labels[rows] == y], np.flatnonzero(labels == y)[: taken[y]])
    np.testing.assert_array_equal(likelihood.balanced_rows(labels, None), np.arange(40))
