"""The weights that come with the package: whole, small, of the recipe that the config trains, and drawing dishes."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import food101_cheap
from fooddiff.api import SHIPPED
from fooddiff.build import recipe, sampler_spec
from fooddiff.commands.scripts import sample
from fooddiff.runs.weights_file import read_weights

MEBIBYTES_AT_THE_MOST = 25


def test_they_are_those_of_the_cheap_recipe():
    about, params = read_weights(SHIPPED)  # which checks their hash
    assert SHIPPED.stat().st_size <= MEBIBYTES_AT_THE_MOST * 2**20
    assert len(about["class_names"]) == 101
    assert all(np.isfinite(value).all() for value in params.values())
    trained, wanted = ConfigDict(about["config"]), food101_cheap.get_config()
    assert recipe(trained) == recipe(wanted)
    assert sampler_spec(trained.sample) == sampler_spec(wanted.sample)


def test_they_name_no_place_of_the_machine_that_trained():
    config = read_weights(SHIPPED).about["config"]
    assert (config["data"]["path"], config["data"]["cache_dir"], config["init_from"]) == (None, "data/cache", None)


@pytest.mark.slow
def test_dishes_are_drawn_without_a_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample(["--classes=edamame,miso_soup", "--per_class=2", "--steps=12", "--sampler=sde_dpmpp_2m"])
    (file,) = (tmp_path / "samples").glob("*.npz")
    with np.load(file) as arrays:
        edamame, soup = arrays["arr_0"].reshape(2, 2, 64, 64, 3)
    green = [images[..., 1].mean() - images[..., [0, 2]].mean() for images in (edamame, soup)]
    assert green[0] > 20 > green[1]  # grey levels
