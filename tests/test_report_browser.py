"""The page of a real training in a real browser: headless Chromium with its driver, both from Debian's packages.

FOODDIFF_REPORT_RUNS=WORKDIR:WORKDIR:... opens the page of other runs, too.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fooddiff.commands import train
from fooddiff.commands.report import main
from tests import tiny
from tests.browser import chromium as browser_with
from tests.browser import contrast, needs_chromium, set_screen
from tests.random_stem import random_stem

pytestmark = [pytest.mark.slow, needs_chromium]
LOADED = "return [...document.images].filter(image => !image.hidden).map(image => [image.complete, image.naturalWidth])"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("workspace")
    np.savez(workspace / "stem.npz", **random_stem())
    for seed in (1, 2):
        config = tiny.config(
            workspace, seed=seed, eval__inception=str(workspace / "stem.npz"), eval__per_class=3, sample__every_steps=2
        )
        with tiny.small_reference(20):
            train.run(config, workspace / f"seed_{seed}")
    main([str(workspace / "seed_1"), str(workspace / "seed_2"), "--out", str(workspace / "report.html")])
    return workspace / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser_with(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(params=[(1280, "light"), (360, "dark")], ids=["desktop", "phone"])
def browser(chromium, page, request):
    """The page, opened anew; at the end its console must be empty and every picture there."""
    set_screen(chromium, *request.param)
    chromium.get(page.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []
    pictures = chromium.execute_script(LOADED)
    assert pictures
    assert all(complete and width > 0 for complete, width in pictures), pictures


def one(browser, selector):
    return browser.find_element("css selector", selector)


def shown(browser, selector):
    return [element for element in browser.find_elements("css selector", selector) if element.is_displayed()]


def press(element, *keys):
    element.send_keys(*keys)


def test_nothing_is_wider_than_the_screen(browser):
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_the_slider_moves_by_keyboard_and_changes_every_picture(browser):
    from selenium.webdriver.common.keys import Keys

    slider = one(browser, "#steps")
    before = [image.get_attribute("src") for image in shown(browser, ".strips img")]
    assert len(before) == 4  # two runs, two classes
    assert one(browser, "#step").text == "4"
    press(slider, Keys.ARROW_LEFT)
    assert one(browser, "#step").text == "2"
    assert slider.get_attribute("aria-valuetext") == "step 2"
    after = shown(browser, ".strips img")
    assert all(image.get_attribute("src") != old for image, old in zip(after, before, strict=True))
    assert "seed_1, step 2" in after[0].get_attribute("alt")


def test_a_class_is_filtered_and_weights_are_chosen(browser):
    from selenium.webdriver.support.select import Select

    Select(one(browser, "#classes")).select_by_visible_text("1")
    assert [heading.text for heading in shown(browser, "section.class h3")] == ["1"]
    before = shown(browser, ".strips img")[0].get_attribute("src")
    press(one(browser, 'input[name="weights"][value="raw"]'), " ")
    image = shown(browser, ".strips img")[0]
    assert image.get_attribute("src") != before
    assert "raw weights" in image.get_attribute("alt")


def test_scale_and_curves_are_chosen(browser):
    assert {d.get_attribute("data-scale") for d in shown(browser, ".drawing")} == {"log"}
    assert shown(browser, ".raw")
    press(one(browser, 'input[name="scale"][value="linear"]'), " ")
    press(one(browser, 'input[name="curves"][value="smooth"]'), " ")
    assert {d.get_attribute("data-scale") for d in shown(browser, ".drawing")} == {"linear"}
    assert not shown(browser, ".raw")
    assert shown(browser, ".smooth")


def test_the_table_says_what_the_records_say(browser, page):
    one(browser, "summary").click()
    rows = [
        [cell.text for cell in row.find_elements("css selector", "th, td")]
        for row in shown(browser, ".distances tbody tr")
    ]
    expected = {}
    for path in page.parent.glob("seed_*/eval/*.json"):
        record = json.loads(path.read_text())
        made_by, (result,) = record["samples"]["made_by"], record["results"]
        expected[path.parent.parent.name, made_by["weights"], str(made_by["step"]), path.name] = result["value"]
    assert len(rows) == len(expected) == 8
    for run, weights, step, value, _, _, _, file in rows:
        np.testing.assert_allclose(float(value.split()[0]), expected[run, weights, step, file], rtol=1e-3)
    assert sum("best" in row[3] for row in rows) == 4


def test_text_stands_out_from_the_page(browser):
    for selector in ("body", ".note", "a", ".drawing svg"):
        assert contrast(browser, selector) >= 4.5, selector


@pytest.mark.skipif("FOODDIFF_REPORT_RUNS" not in os.environ, reason="FOODDIFF_REPORT_RUNS names no workdirs")
def test_the_page_of_other_runs(chromium, tmp_path):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    workdirs = [Path(each) for each in os.environ["FOODDIFF_REPORT_RUNS"].split(os.pathsep)]
    main([*map(str, workdirs), "--out", str(tmp_path / "report.html")])
    chromium.get((tmp_path / "report.html").as_uri())
    Select(one(chromium, "#classes")).select_by_index(1)
    slider = one(chromium, "#steps")
    press(slider, Keys.HOME)
    seen = set()
    while one(chromium, "#step").text not in seen:
        seen.add(one(chromium, "#step").text)
        assert len(shown(chromium, ".strips img")) == len(workdirs)
        assert all(complete and width > 0 for complete, width in chromium.execute_script(LOADED))
        press(slider, Keys.ARROW_RIGHT)
    assert len(seen) == 1 + int(slider.get_attribute("max"))
    for details in shown(chromium, "details"):
        one(details, "summary").click()
    records = [record for workdir in workdirs for record in workdir.glob("eval/*.json")]
    assert len(shown(chromium, ".distances tbody tr")) == len(records)
    assert chromium.get_log("browser") == []
