"""The demo's server: the page, orders as server-sent events, and drawings as files. Owns who draws and who waits.

Starlette with uvicorn rather than Gradio: two small packages that send nothing anywhere and load nothing from a
network, and events let images appear while they are denoised and a closed page free the work.
"""

import asyncio
import base64
import ipaddress
import json
import logging
import re
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fooddiff.demo import orders
from fooddiff.demo.drawing import Look, Painter
from fooddiff.demo.orders import Order, OrderError, command_of, query_of, read_order
from fooddiff.runs.load import class_ids
from fooddiff.sample.generate import npz_bytes
from fooddiff.sample.grid import class_grid, png_bytes
from fooddiff.settings import MAX_SEED

log = logging.getLogger(__name__)

MAX_WAITING = 16  # orders in the line, with the one that is drawn
KEPT = 32  # finished drawings that can be had again, at most MAX_IMAGES images each
SECONDS_TO_LEAVE = 2  # that open connections get when the server ends


class Event(NamedTuple):
    """What a page hears of its order."""

    name: str  # order, place, look, done or failed
    data: Mapping[str, Any]

    def encode(self) -> bytes:
        """As server-sent events are written."""
        return f"event: {self.name}\ndata: {json.dumps(self.data)}\n\n".encode()


class Studio:
    """One order is drawn at a time; the others wait in the order of their arrival. Knows no HTTP."""

    def __init__(self, painter: Painter):
        """Takes the painter, whose steps are taken in a thread of their own."""
        self.painter = painter
        self._line: list[asyncio.Event] = []  # one of each visitor, set when the line moves; the first one's is drawn
        self._kept: OrderedDict[Order, np.ndarray] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "painter")

    @property
    def is_full(self) -> bool:
        """Whether a further visitor would have to wait too long."""
        return len(self._line) >= MAX_WAITING

    def finished(self, order: Order) -> np.ndarray | None:
        """The images of one of the last orders, uint8[n, h, w, 3], or None."""
        return self._kept.get(order)

    async def draw(self, order: Order) -> AsyncIterator[Event]:
        """Draws an order when its turn comes. To close the iterator is to leave the line, or to stop the drawing."""
        if (images := self.finished(order)) is not None:
            yield _look(Look(0, order.spec.steps, order.spec.steps, images))
            return
        moved = asyncio.Event()
        self._line.append(moved)
        try:
            while ahead := self._line.index(moved):
                yield Event("place", {"ahead": ahead})
                await moved.wait()
                moved.clear()
            parts, looks = [], self.painter.paint(order)
            while look := await asyncio.get_running_loop().run_in_executor(self._thread, next, looks, None):
                yield _look(look)
                if look.done == look.steps:
                    parts.append(look.images)
            self._keep(order, np.concatenate(parts))
        finally:
            self._line.remove(moved)
            for other in self._line:
                other.set()

    def _keep(self, order: Order, images: np.ndarray) -> None:
        self._kept[order] = images
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)


def _look(look: Look) -> Event:
    images = [] if look.images is None else [_data_uri(image) for image in look.images]
    return Event("look", {**look._asdict(), "images": images})


def _data_uri(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png_bytes(Image.fromarray(pixels))).decode()


class Drawing(Response):
    """An order's events, for as long as the page listens."""

    media_type = "text/event-stream"

    def __init__(self, order: Order, studio: Studio, about: Mapping[str, Any]):
        """Takes what the page is told first; nothing is drawn yet."""
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._order, self._studio, self._about = order, studio, about

    async def __call__(self, scope, receive, send) -> None:
        """Sends events until all is drawn, the page is closed or the server ends, which cancels this."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        drawing = asyncio.create_task(self._send_events(send))
        closed = asyncio.create_task(_until_closed(receive))
        try:
            await asyncio.wait({drawing, closed}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _tell(send, Event("failed", {"message": "The server was stopped."}), more=False)
        finally:
            for task in (drawing, closed):
                task.cancel()

    async def _send_events(self, send) -> None:
        await _tell(send, Event("order", self._about))
        try:
            async with aclosing(self._studio.draw(self._order)) as events:
                async for event in events:
                    await _tell(send, event)
        except Exception as error:  # whatever it is, the page is told, and the next visitor is served
            log.exception("the drawing failed")
            await _tell(send, Event("failed", {"message": f"The drawing failed: {error}"}), more=False)
        else:
            await _tell(send, Event("done", {}), more=False)


async def _tell(send, event: Event, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": event.encode(), "more_body": more})


async def _until_closed(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class OwnPageOnly:
    """Refuses what other sites' pages make a browser ask for, which reaches 127.0.0.1 and would take its time.

    A browser says whose page asks in Origin and Sec-Fetch-Site. A page whose own name was made to lead here (DNS
    rebinding) has that name in Host, so a server for its machine alone answers to no names but localhost and addresses.
    A link to the page may be anywhere.
    """

    def __init__(self, app, *, any_name: bool):
        """Wraps an app; any_name accepts every Host."""
        self._app, self._any_name = app, any_name

    async def __call__(self, scope, receive, send) -> None:
        """Answers 403, or lets the request through."""
        if scope["type"] != "http":  # the server's own start and end
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        followed_a_link = scope["path"] == "/" and headers.get("sec-fetch-dest") == "document"
        if not (self._any_name or _name_of(host) == "localhost" or _address(_name_of(host))):
            answer = PlainTextResponse(f"no server of the name {host[:60]!r}: --host=0.0.0.0 accepts any", 403)
        elif headers.get("origin", f"http://{host}").partition("://")[2] != host or (
            headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed_a_link
        ):
            answer = PlainTextResponse("another page asked for this", 403)
        else:
            answer = self._app
        await answer(scope, receive, send)


def _name_of(host: str) -> str:
    """The name or address in HOST or HOST:PORT."""
    return re.sub(r":\d*$", "", host).strip("[]")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(name)
    return None


def _is_local(host: str) -> bool:
    """Whether a server that listens there is seen by its own machine alone."""
    return host == "localhost" or getattr(_address(host), "is_loopback", False)


def make_app(painter: Painter, workdir: Path, *, host: str = "127.0.0.1") -> Starlette:
    """Makes the server of a painter.

    Args:
        painter: draws.
        workdir: what the model was loaded from, for command lines.
        host: where it will listen. One that other machines see may be called by any name.
    """
    studio, menu, trained = Studio(painter), painter.menu, painter.model.trained

    def read(request: Request) -> Order:
        return read_order(request.query_params.multi_items(), menu)

    async def get_menu(request: Request) -> Response:
        return JSONResponse(
            {
                "model": {"step": trained.step, "weights": trained.weights, "size": trained.config.data.image_size},
                "dishes": menu.class_names,
                "samplers": menu.samplers,
                "guides": menu.guides,
                "usual": {**menu.usual.to_json(), "number": orders.NUMBER, "dish": menu.class_names[0]},
                "limits": {
                    "number": orders.MAX_IMAGES, "seed": MAX_SEED, "steps": menu.max_steps,
                    "guidance": orders.MAX_GUIDANCE,
                },
            }
        )  # fmt: skip

    async def draw(request: Request) -> Response:
        order = read(request)
        if studio.is_full:
            return PlainTextResponse(f"{MAX_WAITING} visitors are waiting already: try again in a while", 503)
        about = {
            "query": query_of(order, menu),
            "command": command_of(order, menu, workdir, step=trained.step, weights=trained.weights),
            "captions": [name for name in order.names for _ in range(order.number)],
            "steps": order.spec.steps,
        }
        return Drawing(order, studio, about)

    def file_of(encode, ending: str, media_type: str):
        async def get_file(request: Request) -> Response:
            order = read(request)
            if (images := studio.finished(order)) is None:
                return PlainTextResponse(f"this is not among the last {KEPT} drawings: draw it again first", 404)
            name = f"{order.dishes[0] if len(order.dishes) == 1 else f'{len(order.dishes)}_dishes'}_seed{order.seed}"
            headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}.{ending}"}
            return Response(encode(order, images), media_type=media_type, headers=headers)

        return get_file

    def png(order: Order, images: np.ndarray) -> bytes:
        return png_bytes(class_grid(images.reshape(len(order.dishes), order.number, *images.shape[1:]), order.names))

    def npz(order: Order, images: np.ndarray) -> bytes:
        return npz_bytes(images, np.repeat(np.int32(class_ids(menu.class_names, order.dishes)), order.number))

    async def refuse(request: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), 400)

    return Starlette(
        routes=[
            Route("/menu", get_menu),
            Route("/draw", draw),
            Route("/drawing.png", file_of(png, "png", "image/png")),
            Route("/drawing.npz", file_of(npz, "npz", "application/octet-stream")),
            Mount("/", StaticFiles(packages=[("fooddiff.demo", "page")], html=True)),
        ],
        exception_handlers={OrderError: refuse},
        middleware=[Middleware(OwnPageOnly, any_name=not _is_local(host))],
    )


def listen(host: str, port: int) -> socket.socket:
    """Opens the server's socket; port 0 takes any that is free.

    Raises:
        OSError: the address is not of this machine, or somebody else listens there.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen on port {port} of {host} ({error}): choose another --port or --host") from error


def serve(app: Starlette, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM."""
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=SECONDS_TO_LEAVE)
    with suppress(KeyboardInterrupt):  # uvicorn raises SIGINT once more when it has ended
        uvicorn.Server(config).run(sockets=[listener])
