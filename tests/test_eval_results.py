import copy
import json
import math

import jax
import pytest
from rich.console import Console

from fooddiff.eval.distances import Estimate
from fooddiff.eval.results import (
    differences,
    frechet_result,
    plain_result,
    print_table,
    read_record,
    record,
    write_record,
)
from fooddiff.eval.weights import InceptionWeights

WEIGHTS = InceptionWeights({}, "my stem", "0123abcd" * 8, False)
NAME = "FD-64[my stem 0123abcd]"


def frechet(value=1.0, error=0.1, bias=0.01, n=1000, warnings=()):
    return frechet_result(NAME, Estimate(value, error, bias), n=n, dimension=64, warnings=warnings)


def a_record(*results):
    return record(
        results,
        weights=WEIGHTS,
        resize="tf1",
        samples={"name": "ours", "identity": {"sha256": "ab"}, "n": 1000, "n_per_class": {"a": 1000}, "made_by": {}},
        reference={"name": "test", "identity": {"sha256": "cd"}, "n": None, "n_per_class": None},
        versions={"jax": jax.__version__},
    )


def test_enough_images_give_no_warning():
    assert frechet().warnings == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 64}, "singular"),
        ({"n": 3, "error": None, "bias": None}, "too small to measure"),
        ({"bias": 0.2}, "0.2 of 1 is bias"),
        ({"value": -1e-9, "bias": 1e-6}, "is bias"),
        ({"warnings": ["the reference is odd"]}, "odd"),
    ],
)
def test_a_figure_that_needs_a_caveat_carries_it(change, said):
    warnings = frechet(**change).warnings
    assert any(said in warning for warning in warnings)
    assert all(warning.startswith(NAME) for warning in warnings)


def test_a_record_is_one_json_file_with_everything_a_number_depends_on(tmp_path):
    path = tmp_path / "eval" / "ours.json"
    write_record(path, a_record(frechet(), plain_result("KD-64[my stem 0123abcd]", Estimate(0.5, 0.1, 0.0), n=1000)))
    content = json.loads(path.read_text())
    assert [result["metric"] for result in content["results"]] == [NAME, "KD-64[my stem 0123abcd]"]
    assert content["results"][0] == {
        "metric": NAME, "value": 1.0, "error": 0.1, "bias": 0.01, "jackknife": [], "n": 1000, "warnings": []
    }  # fmt: skip
    assert content["inception"] == {"name": "my stem", "sha256": WEIGHTS.sha256, "genuine": False}
    assert content["resize"] == "tf1"
    assert content["samples"]["n_per_class"] == {"a": 1000}
    assert content["reference"]["identity"] == {"sha256": "cd"}


def test_a_number_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path / "a.json", a_record(frechet(value=math.nan)))
    assert not list(tmp_path.iterdir())


def test_the_table_never_shows_a_number_alone():
    console = Console(width=160, record=True, quiet=False)
    with console.capture() as capture:
        print_table(a_record(frechet(0.34567)), console)
    for text in (NAME, "0.3457 ± 0.1", "0.01", "1,000", "test, n = unknown", "tf1"):
        assert text in capture.get()


def scored(tmp_path, value, jackknife):
    """A record of samples, written and read."""
    estimate = Estimate(value, 0.5, 0.01, jackknife)
    content = a_record(frechet_result(NAME, estimate, n=1000, dimension=64, warnings=()))
    content["samples"]["made_by"] = {"seed": 0}
    write_record(tmp_path / "record.json", content)
    return read_record(tmp_path / "record.json")


def test_two_records_are_compared_in_pairs(tmp_path):
    a, b = scored(tmp_path, 5.0, (4.0, 5.0, 6.0, 5.0)), scored(tmp_path, 3.0, (2.0, 3.0, 4.0, 2.5))
    ((metric, ours, theirs, difference),) = differences(a, b)
    assert (metric, ours.value, theirs.value, difference.value) == (NAME, 5.0, 3.0, 2.0)
    assert difference.error == pytest.approx(math.sqrt(3 * 0.1875 / 4))  # of 2, 2, 2 and 2.5


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("samples", "made_by", "seed"), 1, "the seed of the samples"),
        (("samples", "n_per_class"), {"a": 500, "b": 500}, "the samples per class"),
        (("reference", "identity", "sha256"), "ef", "the reference"),
        (("resize",), "half_pixel", "the resize rule"),
        (("results", 0, "metric"), "FD-64[another]", "no Fréchet distance"),
    ],
)
def test_records_that_do_not_pair_are_refused(tmp_path, path, value, said):
    a = scored(tmp_path, 5.0, (4.0, 5.0, 6.0, 5.0))
    b = copy.deepcopy(a)
    *sections, name = path
    place = b
    for section in sections:
        place = place[section]
    place[name] = value
    with pytest.raises(ValueError, match=said):
        differences(a, b)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": [{}]}', '{"results": []}', "[" * 100_000, "\xff"])
def test_other_files_are_not_records(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a\.json is not a record"):
        read_record(tmp_path / "a.json")
