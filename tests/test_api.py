"""The Python API on a tiny model."""

import pytest

import fooddiff
from tests import tiny_weights


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (dict(classes="pizza"), r"classes is 'pizza', expected a list of names: \['pizza'\]"),
        (dict(seed=2**32), "seed is 4294967296, expected an integer from 0 to 4294967295"),
        (dict(seed=-1), "seed is -1"),
        (dict(per_class=0), "per_class is 0"),
        (dict(classes=["piza"]), "no class 'piza': .*: did you mean pizza"),
    ],
)
def test_bad_requests_are_named(tmp_path, request_, message):
    model = fooddiff.load(tiny_weights.write(tmp_path / "tiny.safetensors"))
    with pytest.raises(ValueError, match=message):
        model.sample(**request_)
