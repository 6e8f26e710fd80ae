"""The endpoints: chat completions, the models, health and metrics. Nothing of a request is kept or logged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lsg_jax.serve.engine import Engine, Model, Piece, Ticket
from lsg_jax.serve.guard import Guard
from lsg_jax.serve.metrics import CONTENT_TYPE_LATEST, Metrics
from lsg_jax.serve.models import Models
from lsg_jax.serve.pictures import Pictures
from lsg_jax.serve.question import Limits, Question, question
from lsg_jax.serve.reply import DONE, Completion, error_body, event
from lsg_jax.serve.request import ChatRequest, Refused, parse, shortened
from lsg_jax.serve.room import Room
from lsg_jax.vlm import VLM
from lsg_jax.web import Stalled, TooLarge, bounded_body

logger = logging.getLogger(__name__)

# These bound the memory of what is not yet a question.
BODIES = 256 << 20  # bytes of bodies that are held
LARGE = 1 << 20  # bytes of a body from which on one is parsed at a time: JSON may take 30 times its bytes
PREPARING = 8  # requests that are parsed, or whose images are fetched and decoded, at a time
READING_SECONDS = 60.0  # that a client may take to send a body

GONE = 499
"""Status, in the metrics alone, of a request whose client did not wait for the answer."""


class ChatServer:
    """What the endpoints do; `make_app` has them.

    Args:
        name: of the model, as requests have it.
        fingerprint: of its weights.
    """

    def __init__(
        self,
        models: Models,
        engine: Engine,
        pictures: Pictures,
        metrics: Metrics,
        limits: Limits,
        *,
        name: str,
        fingerprint: str,
    ):
        self.models, self.engine, self.pictures, self.metrics, self.limits = models, engine, pictures, metrics, limits
        self.name, self.fingerprint, self.created = name, fingerprint, int(time.time())
        self.room, self.parsing, self.preparing = Room(BODIES), asyncio.Lock(), asyncio.Semaphore(PREPARING)

    async def chat(self, request: Request) -> Response:
        """Answers a chat completion, in one piece or as a stream of events."""
        events = _Events()
        started = time.monotonic()
        ticket = None
        try:
            ticket = self.engine.admit(events.put)
            asked, completion = await self._asked(request, ticket)
        except BaseException as error:
            if ticket is not None:
                self.engine.leave(ticket)
            return self._refuse(error)
        self.metrics.prompt_tokens.inc(completion.prompt_tokens)
        told = _Told(self.metrics, started)
        if asked.stream:
            stream = self._stream(events, completion, told, usage=asked.include_usage)
            return _TicketStream(stream, lambda: self._left(ticket, told))
        return await self._whole(request, ticket, events, completion, told)

    async def _asked(self, request: Request, ticket: Ticket) -> tuple[ChatRequest, Completion]:
        """Reads a request and queues its question. Raises Refused."""
        async with self.room.of_one() as take:
            try:
                body = await bounded_body(request, self.limits.max_body, seconds=READING_SECONDS, take=take)
            except TooLarge as error:
                raise Refused(413, f"the request has {error}", code="request_too_large") from None
            except ClientDisconnect:
                raise Refused(GONE, "the client has gone", code="gone") from None
            except Stalled:
                raise Refused(408, "the request does not come in time: try again", code="timeout") from None
            # one by one, small bodies would reach the engine too slowly to share a batch
            async with self.parsing if len(body) > LARGE else contextlib.nullcontext(), self.preparing:
                asked = await run_in_threadpool(parse, body, max_images=self.limits.max_images)
            del body
            if asked.model != self.name:
                problem = f"model: there is no {shortened(repr(asked.model))}, this server has {self.name!r}"
                raise Refused(404, problem, param="model", code="model_not_found")
            model = self.models.choose(asked.method, asked.coefficients)
            async with self.preparing:
                files = await self.pictures.fetched(asked.images)
                made = await run_in_threadpool(self._question, asked, files, model)
        completion = Completion(self.name, asked.method or self.models.default, len(made.encoded.ids), self.fingerprint)
        self.engine.ask(ticket, model, made)
        return asked, completion

    def _question(self, asked: ChatRequest, files: Sequence[bytes | str], model: Model) -> Question:
        return question(asked, self.pictures.checked(files), model.processor, self.limits)

    def _refuse(self, error: BaseException) -> Response:
        """The reply to a request that is not answered."""
        if isinstance(error, asyncio.CancelledError):
            error = Refused(503, "the server stops: ask again when it is back", code="stopping")
        if not isinstance(error, Exception):
            raise error
        if not isinstance(error, Refused):
            # its text may be of the request, so the log does not have it
            logger.error("lsg serve: %s while a request was read", type(error).__name__)
            error = Refused(500, f"the server failed ({type(error).__name__})", code="server_failed")
        self.metrics.requests.labels(str(error.status)).inc()
        return JSONResponse(error_body(error), error.status, error.headers)

    async def _whole(self, request: Request, ticket: Ticket, events: _Events, completion: Completion, told: _Told) -> Response:
        """The reply in one piece, unless its client goes away first."""

        async def collect() -> Response:
            texts = []
            async for piece in events:
                texts.append(piece.text)
                told.piece(piece)
            return JSONResponse(completion.whole("".join(texts), told.tokens, told.finish or ""))

        answer, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self._left(ticket, told)
                return Response(status_code=GONE)
            reply = await answer
            told.end(200)
            return reply
        except (Refused, asyncio.CancelledError) as error:
            told.ended = True
            return self._refuse(error)
        finally:
            self._left(ticket, told)
            for task in (answer, gone):
                task.cancel()

    async def _stream(self, events: _Events, completion: Completion, told: _Told, *, usage: bool) -> AsyncIterator[str]:
        """The events of a stream."""
        yield completion.chunk({"role": "assistant", "content": ""}, usage=usage)
        try:
            async for piece in events:
                told.piece(piece)
                if piece.text:
                    yield completion.chunk({"content": piece.text}, usage=usage)
        except Refused as error:
            told.end(error.status)
            yield event(error_body(error))
            return
        told.end(200)
        yield completion.chunk({}, told.finish, usage=usage)
        if usage:
            yield completion.usage_chunk(told.tokens)
        yield DONE

    def _left(self, ticket: Ticket, told: _Told) -> None:
        """Frees what a request has, if that has not been done."""
        self.engine.leave(ticket)
        told.end(GONE)

    async def list_models(self, request: Request) -> Response:
        """The one model, with the methods that the field `lsg` may name."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        """The model, by its name."""
        if request.path_params["name"] != self.name:
            return _error(Refused(404, f"there is no such model, this server has {self.name!r}", code="model_not_found"))
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lsg_jax",
            "max_model_len": self.limits.max_length,
            "lsg": {"methods": self.models.names, "default": self.models.default},
        }

    async def health(self, request: Request) -> Response:
        """Says that the server answers; open to all."""
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """The counters, for Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class _Events:
    """Pieces of an answer, from the engine's thread to the loop of the server."""

    def __init__(self) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Piece | Refused]()

    def put(self, event: Piece | Refused) -> None:
        """Called on the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces up to the last. Raises what the answer failed with."""
        while True:
            event = await self._queue.get()
            if isinstance(event, Refused):
                raise event
            yield event
            if event.finish:
                return


class _Told:
    """What the metrics are told of one answer."""

    def __init__(self, metrics: Metrics, started: float):
        self._metrics, self._started, self._first = metrics, started, True
        self.tokens, self.ended = 0, False
        self.finish: str | None = None

    def piece(self, piece: Piece) -> None:
        """Counts what is new."""
        if self._first:
            self._metrics.first_seconds.observe(time.monotonic() - self._started)
        self._metrics.new_tokens.inc(piece.tokens - self.tokens)
        self._first, self.tokens, self.finish = False, piece.tokens, piece.finish

    def end(self, status: int) -> None:
        """Counts the request, once."""
        if not self.ended:
            self.ended = True
            self._metrics.requests.labels(str(status)).inc()
            if status == 200:
                self._metrics.seconds.observe(time.monotonic() - self._started)


class _TicketStream(StreamingResponse):
    """A stream of events. `left` is called when it has ended, in whatever way, even before its first event."""

    def __init__(self, events: AsyncIterator[str], left: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


async def _disconnected(request: Request) -> None:
    """Returns when the client has closed the connection; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(refused: Refused) -> Response:
    return JSONResponse(error_body(refused), refused.status, refused.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = "POST /v1/chat/completions, GET /v1/models, /health, /metrics"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return _error(Refused(error.status_code, f"this server has {known}", code=code, headers=error.headers))


async def _failed(request: Request, error: Exception) -> Response:
    logger.error("lsg serve: %s", type(error).__name__)
    return _error(Refused(500, f"the server failed ({type(error).__name__})", code="server_failed"))


def chat_server(
    vlm: VLM,
    limits: Limits,
    *,
    name: str,
    batch_size: int = 8,
    max_waiting: int = 256,
    hosts: Collection[str] = (),
    near_tie: float | None = None,
) -> ChatServer:
    """The server of a model; its engine is still to be started. See ChatServer, Engine and Pictures."""
    metrics = Metrics()
    engine = Engine(
        vlm,
        metrics,
        batch_size=batch_size,
        max_new_tokens=limits.max_new_tokens,
        max_waiting=max_waiting,
        near_tie=near_tie,
    )
    pictures = Pictures(hosts, max_pixels=limits.max_pixels)
    return ChatServer(Models(vlm), engine, pictures, metrics, limits, name=name, fingerprint=f"lsg-{vlm.digest[:12]}")


def make_app(server: ChatServer, token: str | None) -> Starlette:
    """The ASGI application, for those who have the token; see `Guard`."""
    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name:path}", server.one_model),
        Route("/health", server.health),
        Route("/metrics", server.show_metrics),
    ]
    handlers: dict[Any, Any] = {HTTPException: _no_route, Exception: _failed}
    return Starlette(routes=routes, middleware=[Middleware(Guard, token=token)], exception_handlers=handlers)
