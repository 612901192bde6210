import functools
import itertools

import jax
import numpy as np
import pytest

from fooddiff.eval import inception, resize
from fooddiff.eval.distances import frechet_distance, kernel_distance
from fooddiff.eval.stats import finish, sums_of
from fooddiff.xla import jit
from tests.golden_cases import DEAR, GOLDEN
from tests.golden_inception import arrays, golden_weights, manifest

if not (GOLDEN / "inception.json").exists():
    pytest.skip(f"{GOLDEN} holds no inception.json", allow_module_level=True)

NAMES = tuple(name for name in inception.DIMENSIONS if name != "spatial")  # which has no golden arrays
RULES = {"tf1": resize.tf1, "half_pixel": resize.half_pixel}


@functools.cache
def network(names, rule):
    params = inception.fold(golden_weights(), names)
    return functools.partial(jit(functools.partial(inception.features, names=names, resize=RULES[rule])), params)


@functools.cache
def golden_features(feature, rule, which, n):
    return np.asarray(network((feature,), rule)(arrays()[which][:n])[feature])


def test_parameters_are_exactly_the_published_ones():
    published = {name: tuple(shape) for name, shape in manifest()["shapes"].items()}
    assert inception.required_parameters(NAMES) == published


def test_64_features_need_29024_weights():
    assert sum(int(np.prod(shape)) for shape in inception.required_parameters(("64",)).values()) == 29_024


@pytest.mark.parametrize(("shallow", "deep"), list(itertools.pairwise(inception.DIMENSIONS)))
def test_what_a_deeper_feature_needs_contains_what_a_shallower_one_needs(shallow, deep):
    shallow, deep = (inception.required_parameters((name,)) for name in (shallow, deep))
    assert shallow.items() < deep.items()


def test_only_the_needed_stages_are_run():
    """Tracing would raise a KeyError at the first block whose parameters are not there."""
    stem = {name: value for name, value in golden_weights().items() if name in inception.required_parameters(("64",))}
    params = inception.fold(stem, ("64",))
    pixels = jax.ShapeDtypeStruct((2, 64, 64, 3), np.uint8)
    out = jax.eval_shape(functools.partial(inception.features, names=("64",), resize=resize.tf1), params, pixels)
    assert {name: value.shape for name, value in out.items()} == {"64": (2, 64)}


def test_the_stored_stem_follows_the_recipe():
    path = GOLDEN / "inception_stem_random.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with np.load(path) as stem:
        for name in stem:
            np.testing.assert_array_equal(stem[name], golden_weights()[name])


@pytest.mark.parametrize("size", [key.split("/")[1] for key in arrays() if key.endswith("/64")])
def test_all_features_match(size):
    found = network(NAMES, "tf1")(arrays()[f"images_{size.removesuffix('px')}"])
    for name in NAMES:
        expected = arrays()[f"features/{size}/{name}"]
        assert np.abs(found[name] - expected).max() <= 1e-4 * np.abs(expected).max(), name


def results(kind):
    """`fid_64_half_pixel_n100` -> its parts."""
    for key, value in manifest()["results"].items():
        parts = key.removesuffix("_full").split("_")
        if parts[0] == kind and parts[1].isdigit():
            yield key, (parts[1], "_".join(parts[2:-1]), int(parts[-1].removeprefix("n")), value)


def pair(feature, rule, n):
    return (golden_features(feature, rule, which, n) for which in ("set_a", "set_b"))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=key, marks=DEAR) for key, case in results("fid") if case[0] == "64"]
)
def test_frechet_distance_of_64_features(case):
    check_frechet(*case)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=key, marks=pytest.mark.long) for key, case in results("fid") if case[0] != "64"]
)
def test_frechet_distance_of_deeper_features(case):
    check_frechet(*case)


def check_frechet(feature, rule, n, expected):
    a, b = (finish(sums_of(features)) for features in pair(feature, rule, n))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("case", [pytest.param(case, id=key) for key, case in results("kid")])
def test_kernel_distance_over_the_full_sets(case):
    feature, rule, n, expected = case
    assert kernel_distance(*pair(feature, rule, n)).value == pytest.approx(expected, rel=1e-4)


def test_an_unknown_feature_is_refused_with_the_choice():
    with pytest.raises(ValueError, match=r"'65'.*choose from 64, 192, spatial, 768, 2048"):
        inception.required_parameters(("65",))
    with pytest.raises(ValueError, match="choose from"):
        inception.required_parameters(())
