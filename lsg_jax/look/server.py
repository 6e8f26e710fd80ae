"""The page of `lsg explore` on 127.0.0.1: pictures and questions in, looks out. Nothing is fetched and nothing is written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import secrets
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from lsg_jax.data.images import MAX_PIXELS, open_image
from lsg_jax.errors import ConfigError, InputError, LsgError
from lsg_jax.look.asking import Asker, Worker
from lsg_jax.look.examples import examples
from lsg_jax.look.guard import MAX_JSON_BYTES, OwnPageOnly
from lsg_jax.look.look import Look
from lsg_jax.look.page import asset, in_script, page_html, templates, view_script
from lsg_jax.look.page_data import head_data, look_data, picture_data
from lsg_jax.web import bounded_body

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
KEPT_PICTURES, KEPT_LOOKS = 16, 64
LOOK_BYTES = 2 << 30  # of all looks that are kept: one of a 7B model may take some hundred MB
MAX_PICTURES, MAX_SIDES, MAX_PROMPT = 8, 2, 20_000
WAITING = 16
ASK_AGAIN = "ask again"
STATE = {"token": 0.0, "layer": 0.0, "head": -1.0, "opacity": 0.0}  # smallest values of what a saved page may start with


class Kept(OrderedDict[str, Any]):
    """The newest things by a random name, as long as there are at most `count` and they cost at most `budget` together."""

    def __init__(self, count: int, cost: Callable[[Any], float] = lambda thing: 0.0, budget: float = math.inf):
        super().__init__()
        self.count, self.cost, self.budget = count, cost, budget

    def add(self, thing: Any) -> str:
        """Keeps one more, and returns its name."""
        name = secrets.token_urlsafe(12)
        self[name] = thing
        while len(self) > self.count or (len(self) > 1 and sum(map(self.cost, self.values())) > self.budget):
            self.popitem(last=False)
        return name

    def get_one(self, name: Any, what: str, again: str) -> Any:
        """The thing of this name. InputError, which says what to do, `again`, if it is not kept, or no longer."""
        if not isinstance(name, str) or name not in self:
            raise InputError(f"this {what} is no longer held: {again}")
        self.move_to_end(name)
        return self[name]

    def use(self, shown: Any, gone: Any) -> None:
        """Counts the things named in `shown` as the newest, and gives up those in `gone`; lists from a request."""
        names = lambda given: [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
        for name in names(gone):
            self.pop(name, None)
        for name in names(shown):
            if name in self:
                self.move_to_end(name)


class Explorer:
    """What the endpoints do; `app` has them."""

    def __init__(self, asker: Asker, *, name: str, gates: str = ""):
        self.asker, self.name, self.gates = asker, name, gates
        self.worker = Worker(waiting=WAITING)
        self.pictures = Kept(KEPT_PICTURES, lambda picture: picture.width * picture.height, MAX_PIXELS)
        self.looks = Kept(KEPT_LOOKS, look_bytes, LOOK_BYTES)
        self.uploading = asyncio.Lock()  # one upload at a time bounds the memory of bodies and decoders

    async def page(self, request: Request) -> Response:
        """The page itself, with what it must know of the model."""
        model = {
            "layers": self.asker.config.text.num_layers,
            "methods": self.asker.titles,
            "examples": [{"prompt": example.prompt} for example in examples()],
            "maxPictures": MAX_PICTURES,
            "maxBytes": MAX_BODY_BYTES,
            "maxPrompt": MAX_PROMPT,
        }
        page = templates().get_template("explore.html.j2")
        return HTMLResponse(page.render(name=self.name, gates=self.gates, model=in_script(model)))

    async def script(self, request: Request) -> Response:
        """All scripts of the page."""
        return Response(view_script() + asset("explore.js"), media_type="text/javascript")

    async def style(self, request: Request) -> Response:
        """The style of the page."""
        return Response(asset("page.css") + asset("explore.css"), media_type="text/css")

    async def example(self, request: Request) -> Response:
        """The picture of one example, as PNG."""
        found = {str(number): example for number, example in enumerate(examples())}.get(request.path_params["number"])
        if found is None:
            return PlainTextResponse("there is no such example", 404)
        return Response(found.png, media_type="image/png")

    async def add_picture(self, request: Request) -> Response:
        """Takes an image file as the body, and returns its name, its size and what the model sees of it."""
        async with self.uploading:
            data = await bounded_body(request, MAX_BODY_BYTES)
            picture, shown = await run_in_threadpool(_opened, data)
        return JSONResponse({"id": self.pictures.add(picture), **shown})

    async def ask(self, request: Request) -> Response:
        """Takes {pictures: [id], prompt, sides: [{method, coefficients}], shown: [id], gone: [id]}; streams lines of JSON.

        The looks in `shown` are those that the page shows meanwhile, and those in `gone` it no longer shows.

        {"state": "waiting", "compiling" or "answering", "side": i}, {"side": i, "id": name, "look": look_data}
        or {"error": line}.
        """
        asked = await _json(request)
        pictures, sides = asked.get("pictures"), asked.get("sides")
        if not isinstance(pictures, list) or not pictures:
            raise InputError(f"there is no picture: add one, and at most {MAX_PICTURES}")
        if len(pictures) > MAX_PICTURES:
            raise InputError(f"there are {len(pictures)} pictures: {MAX_PICTURES} is the most, remove some")
        prompt = asked.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError("there is no question: write one")
        if len(prompt) > MAX_PROMPT:
            raise InputError(f"the question has {len(prompt):,} characters: {MAX_PROMPT:,} is the most")
        if not isinstance(sides, list) or not 1 <= len(sides) <= MAX_SIDES or not all(isinstance(each, dict) for each in sides):
            raise InputError(f"sides: give 1 to {MAX_SIDES} methods")
        opened = [self.pictures.get_one(name, "picture", "add it again") for name in pictures]
        self.looks.use(asked.get("shown"), asked.get("gone"))
        lines = self._answers(opened, prompt.strip(), sides)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    async def _answers(self, pictures: Sequence[Image.Image], prompt: str, sides: Sequence[dict]) -> AsyncIterator[str]:
        """The lines of `ask`. A reader who leaves takes back what has not begun."""
        loop, events, left = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None](), threading.Event()

        def tell(event: dict[str, Any] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(events.put_nowait, event)

        def answer() -> None:
            for index, side in enumerate(sides):
                if left.is_set():
                    return
                report = lambda state, index=index: tell({"state": state, "side": index})
                look = self.asker.look(side.get("method", ""), side.get("coefficients"), pictures, prompt, report)
                data = look_data(look, self.asker.titles[side["method"]] if len(self.asker.titles) > 1 else "")
                tell({"side": index, "id": look, "look": data})

        def finish(future: Future[None]) -> None:
            if not future.cancelled() and (error := future.exception()) is not None:
                tell({"error": one_line(error)})
            tell(None)

        try:
            future = self.worker.submit(answer)
        except InputError as error:
            yield _line({"error": str(error)})
            return
        yield _line({"state": "waiting", "side": 0})
        future.add_done_callback(finish)
        try:
            while (event := await events.get()) is not None:
                if "look" in event:  # kept now, not by the worker: a look that nobody waits for is none that a page shows
                    event["id"] = self.looks.add(event["id"])
                yield _line(event)
        finally:
            left.set()
            future.cancel()

    async def head(self, request: Request) -> Response:
        """The maps of one token, layer and head of a look that the page holds means of only."""
        query = request.query_params
        look: Look = self.looks.get_one(query.get("look"), "answer", ASK_AGAIN)
        try:
            token, layer, head = (int(query[name]) for name in ("token", "layer", "head"))
        except (KeyError, ValueError):
            raise InputError("token, layer and head: give whole numbers") from None
        return JSONResponse(head_data(look, token, layer, head))

    async def save(self, request: Request) -> Response:
        """Takes {looks: [id], state}; returns the page that needs no server."""
        asked = await _json(request)
        names = asked.get("looks")
        if not isinstance(names, list) or not 1 <= len(names) <= MAX_SIDES:
            raise InputError(f"looks: name 1 to {MAX_SIDES} answers")
        looks, titles = [self.looks.get_one(name, "answer", ASK_AGAIN) for name in names], asked.get("titles")
        titles = [str(title) for title in titles[: len(looks)]] if isinstance(titles, list) else []
        page = await run_in_threadpool(partial(page_html, *looks, titles=titles, state=saved_state(asked.get("state"))))
        return HTMLResponse(page, headers={"content-disposition": 'attachment; filename="look.html"'})


def make_app(explorer: Explorer, token: str) -> Starlette:
    """The ASGI application, for those who have the token."""
    routes = [
        Route("/", explorer.page),
        Route("/explore.js", explorer.script),
        Route("/explore.css", explorer.style),
        Route("/examples/{number}.png", explorer.example),
        Route("/pictures", explorer.add_picture, methods=["POST"]),
        Route("/ask", explorer.ask, methods=["POST"]),
        Route("/head", explorer.head),
        Route("/save", explorer.save, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {InputError: _refused, ConfigError: _refused, Exception: _failed}
    return Starlette(routes=routes, middleware=[Middleware(OwnPageOnly, token=token)], exception_handlers=handlers)


def one_line(error: BaseException) -> str:
    """What the page says of an error. The reason of one that is nobody's input goes to the terminal: it may name paths."""
    if isinstance(error, LsgError):
        return " ".join(str(error).split())
    logger.error("lsg explore: %s: %s", type(error).__name__, " ".join(str(error).split())[:500])
    return f"the model failed ({type(error).__name__}): the terminal says why"


def saved_state(state: Any) -> dict[str, Any]:
    """What of a page's choices goes into a saved one: numbers within bounds, known names."""
    given = state if isinstance(state, dict) else {}
    kept: dict[str, Any] = {
        name: int(given[name])
        for name, low in STATE.items()
        if isinstance(given.get(name), int | float) and low <= given[name] < 1e6
    }
    kept |= {name: given[name] for name in ("v", "l") if isinstance(given.get(name), bool)}
    known = {"map": ("raw", "no_sinks", "relative"), "chart": ("visual", "sinks")}
    return kept | {name: given[name] for name, values in known.items() if given.get(name) in values}


def look_bytes(look: Look) -> int:
    """Bytes of memory that a look holds: its maps and its pictures."""
    arrays = [*look.maps.values(), look.l_value, *([] if look.neutral is None else [look.neutral])]
    return sum(each.nbytes for each in arrays) + sum(3 * width * height for width, height in look.sizes)


def _opened(data: bytes) -> tuple[Image.Image, dict[str, Any]]:
    picture = open_image(data)
    return picture, picture_data([picture])[0]


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event, allow_nan=False, separators=(",", ":")) + "\n"


async def _json(request: Request) -> dict[str, Any]:
    data = await bounded_body(request, MAX_JSON_BYTES)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError("this is no JSON object")
    return value


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": one_line(error)}, 400)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": one_line(error)}, 500)
