"""The demo's page in a real browser, against a real server whose painter takes its time."""

import time
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from fooddiff import api
from fooddiff.demo.drawing import Painter
from fooddiff.demo.server import make_app
from fooddiff.sample.grid import read_grid
from tests import tiny_weights
from tests.browser import chromium, contrast, needs_chromium, set_screen
from tests.test_demo import served

pytestmark = [pytest.mark.slow, needs_chromium]
SCREENS = {"desktop": (1280, "light"), "phone": (360, "dark")}
SECONDS = 60  # that anything may take


class PacedPainter(Painter):
    """Counts its steps, and takes long enough for each that a visitor can do something meanwhile."""

    taken = 0

    def paint(self, order):
        for look in super().paint(order):
            self.taken += 1
            time.sleep(0.02)
            yield look


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return PacedPainter(api.load(tiny_weights.write(tmp_path_factory.mktemp("demo") / "tiny.safetensors")))


@pytest.fixture(scope="module")
def url(painter, tmp_path_factory):
    with served(make_app(painter, tmp_path_factory.mktemp("demo") / "tiny.safetensors")) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(tmp_path_factory, downloads):
    preferences = {"download.default_directory": str(downloads), "download.prompt_for_download": False}
    with chromium(tmp_path_factory.mktemp("profile"), **preferences) as driver:
        yield driver


@pytest.fixture(params=SCREENS.values(), ids=SCREENS)
def page(driver, url, request):
    """The page, opened anew, with its first dish drawn; at the end its console must be empty."""
    set_screen(driver, *request.param)
    driver.get(url)
    wait_for(driver, "Drawn")
    yield driver
    assert driver.get_log("browser") == []


def one(page, selector):
    return page.find_element("css selector", selector)


def all_of(page, selector):
    return [element for element in page.find_elements("css selector", selector) if element.is_displayed()]


def until(condition):
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def wait_for(page, status):
    until(lambda: one(page, "#status").text.startswith(status))


def write(page, name, text):
    field = one(page, f'[name="{name}"]')
    field.clear()
    field.send_keys(text)


def choose(page, *dishes):
    from selenium.webdriver.common.keys import Keys

    while chips := all_of(page, "#chosen button"):
        chips[0].click()
    for dish in dishes:
        one(page, "#search").send_keys(dish, Keys.ENTER)
    assert chosen(page) == list(dishes)


def chosen(page):
    return [chip.get_attribute("aria-label").removeprefix("Remove ") for chip in all_of(page, "#chosen button")]


def draw(page):
    from selenium.webdriver.common.keys import Keys

    one(page, "#draw").send_keys(Keys.ENTER)


def pictures(page):
    return [image.get_attribute("src") for image in all_of(page, "#images img")]


def test_dishes_are_chosen_and_drawn_by_keyboard(page):
    choose(page, "ice cream", "pizza")
    write(page, "number", "2")
    write(page, "steps", "60")  # long enough to be seen on the way
    write(page, "seed", str(time.time_ns() % 1000))
    draw(page)
    wait_for(page, "Drawing")
    early = until(lambda: pictures(page))
    wait_for(page, "Drawn: 4 images")
    assert len(pictures(page)) == 4
    assert not set(early) & set(pictures(page))
    assert [caption.text for caption in all_of(page, "figcaption")] == ["ice cream"] * 2 + ["pizza"] * 2
    assert all_of(page, "#images img")[2].get_attribute("alt") == "pizza, generated"
    assert "dish=ice_cream&dish=pizza&number=2" in page.current_url
    assert "--classes=ice_cream,pizza --per_class=2" in one(page, "#command").get_attribute("value")


def test_nothing_is_wider_than_the_screen_and_text_stands_out(page):
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    for selector in ("body", ".note", "figcaption", "#error", "input"):
        assert contrast(page, selector) >= 4.5, selector


def test_every_control_has_a_name(page):
    names = page.execute_script("""
        return [...document.querySelectorAll("input, select, button, progress")].map((control) =>
            control.labels?.length ? control.labels[0].textContent : control.ariaLabel ?? control.textContent);
    """)
    assert len(names) > 20
    assert all(name.strip() for name in names), names


def test_a_drawing_is_stopped(page, painter):
    write(page, "steps", "400")
    write(page, "seed", str(time.time_ns() % 1000))
    draw(page)
    until(lambda: one(page, "#steps").text.startswith("step"))
    one(page, "#stop").click()
    wait_for(page, "Stopped")
    time.sleep(0.5)
    taken = painter.taken
    time.sleep(0.5)
    assert painter.taken == taken
    assert not all_of(page, "#stop")
    write(page, "steps", "3")
    draw(page)
    wait_for(page, "Drawn")


def test_a_link_draws_the_same(page, url):
    choose(page, "gyoza")
    one(page, '[name="mix"]').send_keys("hot dog")
    one(page, '[name="guidance"]').clear()
    one(page, '[name="guidance"]').send_keys("1.5")
    draw(page)
    wait_for(page, "Drawn")
    link, images = one(page, "#link").get_attribute("value"), pictures(page)
    assert "mix=hot_dog&share=50" in link
    assert not all_of(page, "#command")
    page.get(f"{url}?seed=9")
    wait_for(page, "Drawn")
    assert pictures(page) != images
    page.get(link)
    wait_for(page, "Drawn")
    assert pictures(page) == images
    assert chosen(page) == ["gyoza"]
    assert one(page, '[name="guidance"]').get_attribute("value") == "1.5"
    assert one(page, "#share-text").text == "50 %"
    page.back()
    wait_for(page, "Drawn")
    assert pictures(page) != images


def test_the_slider_mixes(page):
    from selenium.webdriver.common.keys import Keys

    one(page, '[name="mix"]').send_keys("pizza")
    draw(page)
    until(lambda: "50%" in one(page, "#images").text and one(page, "#status").text.startswith("Drawn"))
    images = pictures(page)
    one(page, '[name="share"]').send_keys(Keys.ARROW_RIGHT)
    until(lambda: "55%" in one(page, "#images").text and one(page, "#status").text.startswith("Drawn"))
    assert pictures(page) != images


def test_the_gallery_has_one_of_each(page):
    from selenium.webdriver.common.keys import Keys

    one(page, "#tab-dishes").send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("id") == "tab-gallery"
    assert not all_of(page, "#search")
    draw(page)
    wait_for(page, f"Drawn: {len(tiny_weights.DISHES)} images")
    assert [caption.text.replace(" ", "_") for caption in all_of(page, "figcaption")] == list(tiny_weights.DISHES)
    page.refresh()
    wait_for(page, "Drawn")
    assert one(page, "#tab-gallery").get_attribute("aria-selected") == "true"


def test_a_drawing_is_downloaded(page, downloads):
    choose(page, "edamame")
    write(page, "number", "2")
    draw(page)
    wait_for(page, "Drawn: 2")
    for button in all_of(page, "[data-file]"):
        button.click()
    grid, arrays = downloads / "edamame_seed0.png", downloads / "edamame_seed0.npz"
    until(lambda: grid.exists() and arrays.exists())
    time.sleep(0.2)
    with np.load(arrays) as file:
        np.testing.assert_array_equal(read_grid(grid).images[0], file["arr_0"])
        assert file["arr_1"].tolist() == [tiny_weights.DISHES.index("edamame")] * 2
    with Image.open(grid) as picture:
        assert picture.format == "PNG"
    for path in downloads.iterdir():
        with suppress(FileNotFoundError):
            path.unlink()


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("number", "10000", "Number is '10000': expected a whole number from 1 to 128"),
        ("steps", "1000000", "Steps is '1000000': expected a whole number from 2 to 500"),
        ("guidance", "-3", "Guidance is '-3': expected a number from 0 to 20"),
    ],
)
@pytest.mark.parametrize("width", [1280, 360])
def test_what_cannot_be_drawn_is_said(driver, url, width, field, text, said):
    set_screen(driver, width, "light")
    driver.get(url)
    wait_for(driver, "Drawn")
    write(driver, field, text)
    draw(driver)
    assert until(lambda: one(driver, "#error").text) == said
    (refused,) = driver.get_log("browser")  # the browser's own line about the answer 400
    assert "400" in refused["message"]
    write(driver, field, "3")
    draw(driver)
    wait_for(driver, "Drawn")
    assert not all_of(driver, "#error")


def test_a_bad_link_says_what_is_wrong_and_runs_nothing(driver, url):
    driver.get(f"{url}?dish=<img src=x onerror=alert(1)>")
    assert "there is no dish" in until(lambda: one(driver, "#error").text).lower()
    assert driver.find_elements("css selector", "#error img") == []
    assert len(driver.get_log("browser")) == 1


def test_two_visitors_wait_for_each_other(driver, url, tmp_path):
    set_screen(driver, 1280, "light")
    seed = time.time_ns() % 1000
    with chromium(tmp_path) as other:
        driver.get(f"{url}?seed={seed}&steps=300&number=1")
        until(lambda: one(driver, "#steps").text.startswith("step"))
        other.get(f"{url}?seed={seed + 1}&number=1")
        wait_for(other, "One visitor is before you")
        one(driver, "#stop").click()
        wait_for(other, "Drawn: 1 image")
        other.get(f"{url}?seed={seed}&steps=500&number=1")
        until(lambda: one(other, "#steps").text.startswith("step"))
    driver.get(f"{url}?seed={seed + 2}&number=1")  # whoever closes the browser leaves the line, too
    wait_for(driver, "Drawn")
    assert driver.get_log("browser") == []
