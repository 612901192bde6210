"""The perceptual and the adversarial term of an autoencoder: their arithmetic on toy networks, and whole small runs."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import autoencoder
from fooddiff import build, parallel
from fooddiff.arrays import Batch
from fooddiff.commands import train
from fooddiff.commands.convert import main as convert
from fooddiff.model.discriminator import adaptive_weight, hinge_loss
from fooddiff.model.network import Network
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.load import load_trained
from fooddiff.runs.record import read_scalars
from fooddiff.settings import ConfigError
from fooddiff.train.averages import make_averages
from fooddiff.train.state import init_state
from fooddiff.train.step import make_train_step
from fooddiff.train.tasks import autoencoder as task
from tests import test_autoencoder_task
from tests.test_classifier import tiny_classifier

# On toy networks: the decoder, the features and the discriminator are one matrix each

LAST = task.LAST_LAYER
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
PERCEPTUAL = task.Perceptual(
    init=lambda key: {"w": jax.random.normal(key, (3, 5))}, features=lambda params, x: [x, x @ params["w"]], weight=0.3
)
CRITIC = Network(
    init=lambda key: {"w": jax.random.normal(key, (3, 1))}, apply=lambda params, x: jnp.tanh(x @ params["w"])
)


def adversary(start_step=0):
    return task.Adversary(CRITIC, optax.adam(0.1, b1=0.5, b2=0.9), weight=0.5, start_step=start_step)


def toy(**terms):
    return task.make_autoencoder_task(
        init=lambda key: {LAST: jax.random.normal(key, (2, 3)), "encoder": jnp.ones((3, 2))},
        encode=lambda params, x, dropout_key: x @ params["encoder"],
        decode=lambda params, z, dropout_key: jnp.tanh(z @ params[LAST]),
        latent_shape=(8, 8, 2),
        bottleneck=task.no_bottleneck,
        error=task.squared_error,
        dropout=False,
        **terms,
    )


def run(toy_task, steps):
    """The states after 0, 1, ... steps on one batch."""
    optimizer, averages = optax.adam(0.01), make_averages((), warmup=False, power_lengths=())
    step = jax.jit(make_train_step(toy_task, optimizer, averages))
    states = [jax.jit(lambda key: init_state(key, toy_task, optimizer, averages))(jax.random.key(0))]
    for _ in range(steps):
        states.append(step(states[-1], Batch(jnp.asarray(PIXELS), {}), jax.random.key(0)))
    return states


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_perceptual_distance_compares_directions():
    rng = np.random.default_rng(1)
    a, b = ([jnp.asarray(rng.normal(size=(2, s, s, c)), jnp.float32) for s, c in ((4, 3), (2, 6))] for _ in range(2))
    np.testing.assert_allclose(task.perceptual_distance(a, [3 * layer for layer in a]), 0, atol=1e-6)
    np.testing.assert_allclose(task.perceptual_distance(a, [-layer for layer in a]), 4, rtol=1e-5)
    distance = task.perceptual_distance(a, b)
    expected = [
        np.mean([
            2 - 2 * np.mean((x[i] * y[i]).sum(-1) / np.linalg.norm(x[i], axis=-1) / np.linalg.norm(y[i], axis=-1))
            for x, y in zip(a, b, strict=True)
        ])
        for i in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(distance, expected, rtol=1e-5)
    gradient = jax.grad(lambda x: task.perceptual_distance([x], [jnp.ones_like(x)]).sum())(jnp.zeros((1, 2, 2, 3)))
    assert np.isfinite(gradient).all()


def test_runs_without_further_terms_carry_nothing_and_report_what_they_did():
    state = run(toy(), 1)[-1]
    assert state.carried is None
    assert set(task.METRICS) <= state.sums.keys()
    assert not {"perceptual", *task.ADVERSARY_METRICS} & state.sums.keys()


def test_before_its_first_step_the_adversary_changes_nothing_and_then_learns():
    plain, states = run(toy(), 3), run(toy(adversary=adversary(start_step=2)), 3)
    carried = [state.carried["adversary"] for state in states]
    assert [int(learning.steps) for learning in carried] == [0, 1, 2, 3]
    for i in (1, 2):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), states[i].params, plain[i].params)
        assert equal(carried[i]._replace(steps=0), carried[0]._replace(steps=0))
    assert not np.allclose(states[3].params[LAST], plain[3].params[LAST], rtol=1e-4)
    assert not equal(carried[3].params, carried[2].params)


def test_the_discriminator_takes_the_step_of_its_own_optimizer():
    rival = adversary()
    before, after = run(toy(adversary=rival), 1)
    x = jnp.asarray(PIXELS / 127.5 - 1, jnp.float32)
    decoded = jnp.tanh(x @ before.params["encoder"] @ before.params[LAST])
    was = before.carried["adversary"]
    grads = jax.grad(lambda params: hinge_loss(CRITIC.apply(params, x), CRITIC.apply(params, decoded)))(was.params)
    updates, _ = rival.optimizer.update(grads, was.opt_state)
    np.testing.assert_allclose(after.carried["adversary"].params["w"], was.params["w"] + updates["w"], rtol=1e-4)
    assert after.sums["discriminator"][0] / after.sums["discriminator"][1] > 0


def test_the_adversary_is_weighted_by_the_gradients_at_the_last_layer():
    built = toy(perceptual=PERCEPTUAL, adversary=adversary())
    keys = [jax.random.key(i) for i in range(4)]
    params, carried = built.init(keys[0]), built.init_carried(keys[1])
    examples = built.draw(carried, Batch(jnp.asarray(PIXELS), {}), keys[2])
    gradient, terms = jax.jit(jax.grad(built.loss, has_aux=True))(params, carried, examples, keys[3])

    def decoded(last):
        return jnp.tanh(examples.x @ params["encoder"] @ last)

    def differences(last):
        features = [PERCEPTUAL.features(carried["perceptual"], images) for images in (examples.x, decoded(last))]
        return (task.squared_error(examples.x, decoded(last)) + 0.3 * task.perceptual_distance(*features)).mean()

    def against(last):
        return -CRITIC.apply(carried["adversary"].params, decoded(last)).mean()

    pulls = [jax.grad(part)(params[LAST]) for part in (differences, against)]
    weight = 0.5 * adaptive_weight(*pulls)
    np.testing.assert_allclose(terms.further["adversarial_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(gradient[LAST], pulls[0] + weight * pulls[1], rtol=1e-4, atol=1e-6)
    assert equal(built.observe(carried, examples, terms)[0]["perceptual"], carried["perceptual"])


def test_a_step_that_would_spoil_what_is_carried_is_skipped():
    broken = optax.GradientTransformation(lambda params: (), lambda grads, state, _: (jax.tree.map(jnp.log, grads), ()))
    before, after = run(toy(adversary=adversary()._replace(optimizer=broken)), 1)
    assert int(after.skipped) == 1
    assert equal(after.params, before.params)
    assert equal(after.carried, before.carried)


# Whole runs, on digits of 16 pixels


def config(folder, variant="adversarial", **overrides) -> ConfigDict:
    """configs/autoencoder.py:adversarial at a size that trains in seconds."""
    settings = test_autoencoder_task.config(folder, variant)
    settings.perceptual.model = tiny_classifier(folder, "clean").model
    if variant == "adversarial":
        settings.adversary.update(dict(start_step=2, channels=4, num_layers=1))
    settings.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return settings


def test_the_configs_show_the_terms():
    plain, one, two = (autoencoder.get_config(name) for name in ("kl", "perceptual", "adversarial"))
    assert set(two) - set(one) == {"adversary"}
    assert set(one) - set(plain) == {"perceptual"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(perceptual__weight=0.0), r"config\.perceptual\.weight is 0\.0, expected more than 0"),
        (dict(perceptual__model__network="unet"), r"config\.perceptual\.model\.network is 'unet', expected one of adm"),
        (dict(adversary__weight=-1.0), r"config\.adversary\.weight is -1\.0"),
        (dict(adversary__start_step=-1), r"config\.adversary\.start_step and lr are -1"),
        (dict(adversary__num_layers=3), r"config\.adversary: images of 16x16 are too small: expected at least 24"),
        (dict(train__accumulate=2), r"config\.train\.accumulate is 2, expected 1 with config\.adversary"),
    ],
)
def test_bad_values_are_named(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build.make_training(config(tmp_path, **overrides), parallel.make_mesh())


def test_no_file_of_weights_brings_these_networks(tmp_path, capsys):
    (tmp_path / "weights.ckpt").write_bytes(b"")
    with pytest.raises(SystemExit):
        convert([
            "import", str(tmp_path / "weights.ckpt"), "--config=configs/autoencoder.py:adversarial",
            f"--workdir={tmp_path / 'run'}",
        ])  # fmt: skip
    assert "holds the network of config.perceptual" in capsys.readouterr().err


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("adversaries")


@pytest.fixture(scope="module")
def classifier(workspace):
    settings = tiny_classifier(workspace, "clean", data__image_size=16, train__steps=1, train__checkpoint_every=1)
    settings.optimizer.cooldown_steps = None
    train.run(settings, workspace / "classifier")
    return workspace / "classifier"


@pytest.mark.slow
def test_a_resumed_run_is_the_undisturbed_one_and_needs_no_classifier(workspace, classifier):
    ours = partial(config, workspace, perceptual__path=str(classifier))
    train.run(ours(), workspace / "straight")
    shutil.copytree(workspace / "straight", workspace / "resumed")
    shutil.rmtree(workspace / "resumed" / "checkpoints" / "6")
    train.run(ours(perceptual__path=None), workspace / "resumed")
    like = build.make_training(ours(), parallel.make_mesh()).abstract_state
    states = {}
    for name, step in {"straight": 6, "resumed": 6, "early": 3}.items():
        with Checkpoints(workspace / name.replace("early", "straight"), read_only=True) as checkpoints:
            states[name] = checkpoints.restore(step, like)
    jax.tree.map(np.testing.assert_array_equal, states["straight"], states["resumed"])
    features = load_trained(classifier, step=None, weights="ema", mesh=parallel.make_mesh(), task="classifier").params
    assert equal(states["straight"].carried["perceptual"], dict(features))
    assert not equal(states["early"].carried["adversary"].params, states["straight"].carried["adversary"].params)
    recorded = [record for record in read_scalars(workspace / "straight") if "train/loss" in record]
    weights = [record["train/adversarial_weight"] for record in recorded]
    assert weights[:2] == [0, 0]
    assert min(weights[2:]) > 0
    assert all(record["train/perceptual"] > 0 for record in recorded)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (dict(), ConfigError, r"config\.perceptual\.path is None, expected the workdir or the file of a trained cla"),
        (dict(perceptual__path="/nowhere"), FileNotFoundError, "no run in /nowhere"),
        (dict(data__image_size=24), ConfigError, r"classifier of images of 16 pixels, expected .* 24"),
        (dict(perceptual__model__model_channels=64), ConfigError, r"perceptual\.model\.model_channels is 64, but 32"),
    ],
)
def test_other_classifiers_are_named(workspace, classifier, overrides, error, message):
    path = {} if not overrides else {"perceptual__path": str(classifier)}
    with pytest.raises(error, match=message):
        train.run(config(workspace, "perceptual", **(path | overrides)), workspace / "refused")
    assert not (workspace / "refused").exists()
