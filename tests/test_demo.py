"""The demo's server, drawing and orders. That the page works in a browser: test_demo_browser.py."""

import asyncio
import http.client
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from base64 import b64decode
from contextlib import aclosing, contextmanager
from html.parser import HTMLParser
from urllib.parse import parse_qsl

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from fooddiff import api, build
from fooddiff.commands import scripts
from fooddiff.commands.demo import main
from fooddiff.demo import server
from fooddiff.demo.drawing import BATCH_SIZES, LABELS, Look, Painter, batches, mixed
from fooddiff.demo.orders import MAX_IMAGES, OrderError, query_of, read_order
from fooddiff.demo.server import MAX_WAITING, Studio, make_app
from fooddiff.sample.grid import read_grid
from tests import tiny_weights
from tests.test_sample_generate import assert_same_pixels

HOST = "http://127.0.0.1"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights.write(tmp_path_factory.mktemp("demo") / "tiny.safetensors")


@pytest.fixture(scope="module")
def painter(weights):
    return Painter(api.load(weights))


@pytest.fixture(scope="module")
def client(painter, weights):
    with TestClient(make_app(painter, weights), base_url=HOST) as client:
        yield client


def events_of(text):
    """The events of a stream, as (name, data)."""
    pairs = [event.split("\n") for event in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def pixels(data_uri):
    return np.asarray(Image.open(io.BytesIO(b64decode(data_uri.split(",")[1]))))


def drawn(client, query):
    """What a page is told first, and the images that it ends with."""
    response = client.get(f"/draw?{query}")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    (first, about), *middle, (last, _) = events_of(response.text)
    assert (first, last) == ("order", "done")
    images = {}
    for name, look in middle:
        if name == "look" and look["done"] == look["steps"]:
            images |= {look["first"] + i: pixels(image) for i, image in enumerate(look["images"])}
    assert sorted(images) == list(range(len(about["captions"])))
    return about, np.stack([images[i] for i in range(len(images))])


def order(painter, query):
    return read_order(parse_qsl(query, keep_blank_values=True), painter.menu)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "settings"),
    [
        ("dish=pizza&dish=donuts&number=3", dict(classes=["pizza", "donuts"], per_class=3)),
        ("dish=pizza&number=1&guidance=1&steps=3", dict(classes=["pizza"], guidance=1.0, steps=3)),
        (
            "dish=gyoza&seed=7&sampler=dpmpp_2m&guidance=3.5",
            dict(classes=["gyoza"], per_class=2, seed=7, sampler="dpmpp_2m", guidance=3.5),
        ),
        ("dish=*&sampler=ddim", dict(sampler="ddim")),
    ],
)  # fmt: skip
def test_images_are_those_of_the_api(client, painter, query, settings):
    about, images = drawn(client, query)
    assert_same_pixels(images, painter.model.sample(**settings))
    assert about["captions"][0] == settings.get("classes", tiny_weights.DISHES)[0]


@pytest.mark.slow
def test_images_appear_while_they_are_denoised(client):
    events = events_of(client.get("/draw?dish=edamame&number=1&seed=11&steps=30").text)
    looks = [data for name, data in events if name == "look"]
    assert [look["done"] for look in looks] == list(range(31))
    shown = [look for look in looks if look["images"]]
    assert [look["done"] for look in shown[-2:]] == [28, 30]
    assert len(shown) == 12
    assert (pixels(shown[0]["images"][0]) != pixels(shown[-1]["images"][0])).any()


@pytest.mark.slow
def test_the_query_of_an_order_is_the_order(client, painter):
    about, images = drawn(client, "seed=3&dish=donuts&dish=pizza&mix=gyoza&share=35&guidance=1.3&number=2")
    same, again = drawn(client, about["query"])
    assert same == about
    np.testing.assert_array_equal(again, images)
    for query in ("", "dish=*", "dish=pizza&guidance=1&steps=17&sampler=heun", about["query"]):
        wanted = order(painter, query)
        assert order(painter, query_of(wanted, painter.menu)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "query",
    ["dish=pizza&dish=baklava&number=2&seed=5&sampler=ddim&guidance=1.5", "dish=pizza&number=1&guidance=1&steps=3"],
)
def test_the_command_draws_the_same(client, query, tmp_path, monkeypatch):
    about, images = drawn(client, query)
    monkeypatch.chdir(tmp_path)
    _, script, *argv = shlex.split(about["command"])
    assert script == "run_sample.py"
    scripts.sample(argv)
    (file,) = (tmp_path / "samples").glob("*.npz")
    by_command, by_page = np.load(file), np.load(io.BytesIO(client.get(f"/drawing.npz?{query}").content))
    np.testing.assert_array_equal(by_page["arr_0"], images)
    np.testing.assert_array_equal(by_page["arr_1"], by_command["arr_1"])
    assert_same_pixels(by_page["arr_0"], by_command["arr_0"])


@pytest.mark.slow
def test_a_drawing_is_had_as_a_grid(client, tmp_path):
    query = "dish=pizza&dish=ice_cream&number=2&mix=gyoza&share=30"
    _, images = drawn(client, query)
    response = client.get(f"/drawing.png?{query}")
    (tmp_path / "grid.png").write_bytes(response.content)
    grid = read_grid(tmp_path / "grid.png")
    np.testing.assert_array_equal(grid.images.reshape(images.shape), images)
    assert grid.class_names == ("pizza_70%_gyoza_30%", "ice_cream_70%_gyoza_30%")
    assert "2_dishes_seed0.png" in response.headers["content-disposition"]
    missing = client.get("/drawing.png?seed=123456")
    assert missing.status_code == 404
    assert "draw it again" in missing.text


@pytest.mark.slow
def test_a_mix_lies_between_two_dishes_and_keeps_the_noise(client, painter):
    query = "dish=pizza&number=1&mix=donuts"
    pure, none, half, whole = (
        drawn(client, each) for each in ("dish=pizza&number=1", *(f"{query}&share={share}" for share in (0, 50, 100)))
    )
    np.testing.assert_array_equal(pure[1], none[1])
    assert (half[1] != none[1]).any()
    assert (half[1] != whole[1]).any()
    assert none[0]["command"] == pure[0]["command"]
    assert whole[0]["command"] is None
    params = painter.model.trained.params
    pizza, donuts = (tiny_weights.DISHES.index(dish) for dish in ("pizza", "donuts"))
    table = mixed(params, [pizza], donuts, 0.25)[LABELS]
    np.testing.assert_allclose(table[pizza], 0.75 * params[LABELS][pizza] + 0.25 * params[LABELS][donuts], rtol=1e-5)
    np.testing.assert_array_equal(np.delete(table, pizza, 0), np.delete(params[LABELS], pizza, 0))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("dish=piza", "did you mean pizza?"),
        ("dish=Ice cream", "did you mean ice_cream?"),
        ("dish=<script>", "there is no dish"),
        ("dish=", "choose a dish"),
        ("dish=*&dish=pizza", "there is no dish '*'"),
        ("number=10000", "from 1 to 128"),
        ("number=0", "from 1 to 128"),
        ("dish=*&number=13", "130 images: at most 128"),
        ("steps=1000000", "from 2 to 500"),
        ("steps=1", "from 2 to 500"),
        ("dish=pizza&number=128&steps=400", "at most 62 steps"),
        ("steps=1e3", "expected a whole number"),
        ("seed=-1", "from 0 to 4294967295"),
        ("seed=" + "9" * 5000, "expected a whole number"),
        ("seed=\u0663", "expected a whole number"),
        ("guidance=nan", "from 0 to 20"),
        ("guidance=inf", "from 0 to 20"),
        ("guidance=strong", "from 0 to 20"),
        ("sampler=euler", "there is no sampler 'euler'"),
        ("mix=lava", "did you mean baklava?"),
        ("mix=pizza&share=101", "from 0 to 100"),
        ("seed=1&seed=2", "more than once"),
        ("sed=1", "no 'sed'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(client, query, said):
    response = client.get(f"/draw?{query}")
    assert response.status_code == 400
    assert said in response.text
    assert len(response.text) < 200
    assert response.headers["content-type"].startswith("text/plain")


def test_a_discrete_model_has_no_more_steps_than_it_was_trained_with(painter):
    few = painter.menu._replace(max_steps=4, guides=False)
    for query, said in {"steps=5&guidance=1": "from 2 to 4", "steps=4&guidance=2": "trained without"}.items():
        with pytest.raises(OrderError, match=said):
            read_order(parse_qsl(query), few)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 101, MAX_IMAGES])
def test_batches_cover_all_images_with_few_sizes(n, devices):
    parts = list(batches(n, devices))
    assert {size for _, size in parts} <= {size * devices for size in BATCH_SIZES}
    assert [first for first, _ in parts] == list(np.cumsum([0, *(size for _, size in parts[:-1])]))
    assert n <= sum(parts[-1]) < n + devices


@pytest.mark.slow
def test_numbers_alone_need_no_new_program(painter):
    steppers = {
        painter._stepper(order(painter, query).spec)
        for query in ("steps=3", "steps=9&guidance=4", "guidance=0.5&seed=8&dish=gyoza")
    }
    assert len(steppers) == 1
    assert painter._stepper(order(painter, "guidance=1").spec) not in steppers


def test_a_model_without_classes_is_refused(tmp_path):
    file = tiny_weights.write(tmp_path / "weights.safetensors", classes=None)
    with pytest.raises(ValueError, match="knows no classes"):
        Painter(api.load(file))


# The line


class SlowPainter:
    """Draws grey squares, some milliseconds a step; one of seed 13 fails."""

    def __init__(self, painter):
        self.menu, self.model, self.steps = painter.menu, painter.model, []

    def paint(self, order):
        if order.seed == 13:
            raise RuntimeError("out of paint")
        count = order.spec.steps
        for done in range(count + 1):
            self.steps.append((order.seed, done))
            time.sleep(0.005)
            last = done == count
            yield Look(0, done, count, np.full((order.number, 8, 8, 3), order.seed, np.uint8) if last else None)


def test_visitors_wait_in_the_order_of_their_arrival(painter):
    studio = Studio(slow := SlowPainter(painter))

    async def visit(seed):
        return [event async for event in studio.draw(order(painter, f"seed={seed}"))]

    async def all_visit():
        return await asyncio.gather(*(visit(seed) for seed in (1, 2, 3)))

    heard = asyncio.run(all_visit())
    places = [[event.data["ahead"] for event in each if event.name == "place"] for each in heard]
    assert places == [[], [1], [2, 1]]
    assert [seed for seed, _ in slow.steps] == [1] * 6 + [2] * 6 + [3] * 6
    assert all(each[-1].data["done"] == 5 for each in heard)


def test_who_leaves_frees_the_work_and_the_place(painter):
    studio = Studio(slow := SlowPainter(painter))

    async def leave(seed, name):
        async with aclosing(studio.draw(order(painter, f"seed={seed}&steps=500"))) as events:
            async for event in events:
                if event.name == name:
                    return

    async def stay(seed):
        return [event async for event in studio.draw(order(painter, f"seed={seed}"))]

    async def all_visit():
        return (await asyncio.gather(leave(1, "look"), leave(2, "place"), stay(3)))[-1]

    heard = asyncio.run(asyncio.wait_for(all_visit(), 20))
    assert heard[-1].data["done"] == 5
    assert {seed for seed, _ in slow.steps} == {1, 3}
    assert sum(seed == 1 for seed, _ in slow.steps) < 10
    assert not studio.is_full


def test_a_drawing_that_fails_says_so_and_the_next_is_served(painter, weights):
    with TestClient(make_app(SlowPainter(painter), weights), base_url=HOST) as client:
        *_, (name, data) = events_of(client.get("/draw?seed=13").text)
        assert (name, data["message"]) == ("failed", "The drawing failed: out of paint")
        drawn(client, "seed=14")


@contextmanager
def served(app):
    """A real server of an app, in a thread; gives its port."""
    with server.listen("127.0.0.1", 0) as listener:
        config = server.uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        running = server.uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()


def ask(port, query):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", f"/draw?{query}")
    return connection, connection.getresponse()


def test_a_closed_connection_frees_the_work(painter, weights):
    slow = SlowPainter(painter)
    with served(make_app(slow, weights)) as port:
        connection, response = ask(port, "seed=1&steps=500")
        while b"look" not in response.readline():
            pass
        response.close()
        connection.close()
        _, response = ask(port, "seed=2")
        assert events_of(response.read().decode())[-1][0] == "done"
    assert sum(seed == 1 for seed, _ in slow.steps) < 100


def test_a_full_line_is_refused(painter, weights):
    with served(make_app(SlowPainter(painter), weights)) as port:
        visitors = [ask(port, f"seed={100 + i}&steps=500") for i in range(MAX_WAITING)]
        _, refused = ask(port, "seed=1")
        assert refused.status == 503
        assert b"visitors are waiting" in refused.read()
        for connection, response in visitors:
            response.close()
            connection.close()


# Requests that are not the page's own

CROSS = {"sec-fetch-site": "cross-site"}


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/draw?dish=pizza", {"origin": "https://evil.example"}),
        ("/draw?dish=pizza", {"origin": "null"}),
        ("/draw?dish=pizza", {"origin": "http://127.0.0.1:8000"}),
        ("/draw?dish=pizza", CROSS | {"sec-fetch-dest": "image"}),
        ("/draw?dish=pizza", CROSS | {"sec-fetch-dest": "document"}),
        ("/draw?dish=pizza", {"sec-fetch-site": "same-site"}),
        ("/", CROSS | {"sec-fetch-dest": "iframe"}),
        ("/menu", {"host": "evil.example:8101"}),
        ("/menu", {"host": "localhost.evil.example"}),
        ("/menu", {"host": ""}),
    ],
)
def test_what_other_pages_ask_for_is_refused(client, path, headers):
    assert client.get(path, headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/menu", {"host": "localhost:8101", "origin": "http://localhost:8101", "sec-fetch-site": "same-origin"}),
        ("/menu", {"host": "[::1]:8101", "sec-fetch-site": "none"}),
        ("/menu", {"host": "192.168.0.7"}),
        ("/?dish=pizza", CROSS | {"sec-fetch-dest": "document"}),
    ],
)
def test_the_page_itself_and_links_to_it_are_served(client, path, headers):
    assert client.get(path, headers=headers).status_code == 200


def test_a_server_that_others_see_has_any_name_but_no_other_pages(painter, weights):
    with TestClient(make_app(painter, weights, host="0.0.0.0"), base_url="http://kitchen.local:8101") as client:
        assert client.get("/menu").status_code == 200
        assert client.get("/menu", headers={"origin": "https://evil.example"}).status_code == 403


# The page and the command


class Loads(HTMLParser):
    """Everything that a page loads."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attributes):
        self.urls += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]


def test_the_page_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200
    loads = Loads()
    loads.feed(page.text)
    assert sorted(loads.urls) == ["data:,", "demo.css", "demo.js"]
    for name in ("", "demo.css", "demo.js"):
        text = client.get(f"/{name}").text
        assert "http:" not in text
        assert "https:" not in text


def test_the_menu_says_what_there_is(client):
    menu = client.get("/menu").json()
    assert tuple(menu["dishes"]) == tiny_weights.DISHES
    assert tuple(menu["samplers"]) == tuple(build.SAMPLERS)
    assert menu["model"] == {"step": 4, "weights": "ema_0.995", "size": 8}
    assert (menu["usual"]["steps"], menu["usual"]["guidance"]) == (tiny_weights.STEPS, 2.0)


def test_a_taken_port_is_named(weights, capsys):
    with server.listen("127.0.0.1", 0) as listener, pytest.raises(SystemExit) as ended:
        main([f"--workdir={weights}", f"--port={listener.getsockname()[1]}"])
    assert ended.value.code == 1
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_it_quietly_in_the_middle_of_a_drawing(weights):
    command = [sys.executable, "-m", "fooddiff.demo", f"--workdir={weights}", "--port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        _, line = process.stderr.readline(), process.stderr.readline()
        assert "Ctrl-C ends it" in line
        _, response = ask(int(re.search(r":(\d+)/", line)[1]), "steps=500&dish=pizza")
        while b"look" not in response.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert b"The server was stopped" in response.read()
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['uvicorn'] = None; from fooddiff.commands.demo import main; main([])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "the demo needs uvicorn: pip install 'fooddiff[demo]'" in ended.stderr
    assert "Traceback" not in ended.stderr
