"""Answers the questions of `lsg explore`, one at a time, and says what is going on meanwhile."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax.monitoring
from PIL import Image

from lsg_jax.config import ModelConfig
from lsg_jax.errors import InputError
from lsg_jax.look.compute import look
from lsg_jax.look.look import MAPS, Look
from lsg_jax.methods.coefficients import Coefficients, layer_coefficients
from lsg_jax.methods.method import BASE, Method
from lsg_jax.methods.registry import name_of
from lsg_jax.vlm import VLM

logger = logging.getLogger(__name__)

TRACED, COMPILED = "/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"
SMALL = 0.1  # seconds; programs that are traced faster, of single operations, are not spoken of

Report = Callable[[str], None]
"""Called with `compiling` or `answering` when that begins."""


class Asker:
    """The model under each method that the page offers: `methods` and `titles` by name.

    The base model is run with coefficients of 1, which change no key: so it shares its compiled program with all others.

    Args:
        vlm: the model, with gates or another trained method if any are loaded.
        max_new_tokens: longest answer.
    """

    def __init__(self, vlm: VLM, *, max_new_tokens: int):
        self.max_new_tokens = max_new_tokens
        self._ran: set[Method] = set()
        self.config: ModelConfig = vlm.config
        self.methods: dict[str, VLM] = {"base": vlm.plain()}
        self.titles = {"base": "Base"}
        if vlm.method is not BASE:
            self.methods["gates"], self.titles["gates"] = vlm, "Gates" if vlm.gate else name_of(vlm.method)
        if vlm.config.sinks.knows_v_sinks:
            self.titles["coefficients"] = "Coefficients"
            self.methods["coefficients"] = vlm.with_method(Coefficients(), layer_coefficients(None, vlm.config))

    def look(
        self, method: str, coefficients: Any, pictures: Sequence[Image.Image], prompt: str, report: Report = lambda state: None
    ) -> Look:
        """Asks one question.

        Args:
            method: one of `methods`.
            coefficients: [L, 2] of V-sinks and of the rest, for the method of this name; else not looked at.

        Raises:
            InputError: there is no such method, coefficients or images do not fit, or the prompt has more tokens than the model
                has positions: memory grows with their square.
        """
        if not isinstance(method, str) or method not in self.methods:  # it comes from a request
            raise InputError(f"there is no method {method!r} for this model: choose among {', '.join(self.methods)}")
        vlm = self.methods[method]
        if method != "gates" and "coefficients" in self.methods:
            parameters = layer_coefficients(coefficients if method == "coefficients" else None, self.config)
            vlm = self.methods["coefficients"].with_method(Coefficients(), parameters)
        report("answering" if vlm.method in self._ran else "compiling")
        with reporting_compilation(report):
            seen = look(vlm, list(pictures), prompt, self.max_new_tokens, maps=MAPS, most_text=self.config.text.max_positions)
        self._ran.add(vlm.method)
        return seen


@contextlib.contextmanager
def reporting_compilation(report: Report) -> Iterator[None]:
    """Reports `compiling` when JAX has traced a new program in this thread, and `answering` when it has compiled it."""
    mine = threading.get_ident()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if threading.get_ident() != mine:
            return
        if event == TRACED and duration_secs > SMALL:
            report("compiling")
        elif event == COMPILED:
            report("answering")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Worker:
    """One thread that does one job after the other.

    It is a daemon, unlike a thread of ThreadPoolExecutor: Ctrl-C does not wait for an answer or a compilation.
    """

    def __init__(self, *, waiting: int):
        self._jobs: queue.Queue[tuple[Future[Any], Callable[[], Any]]] = queue.Queue(waiting)
        threading.Thread(target=self._run, name="answers", daemon=True).start()

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Queues a job. Its future can be cancelled until it starts. InputError if too many wait."""
        future: Future[Any] = Future()
        try:
            self._jobs.put_nowait((future, job))
        except queue.Full:
            raise InputError("too many questions are waiting: ask again when they are answered") from None
        return future

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return self._jobs.unfinished_tasks > 0

    def _run(self) -> None:
        while True:
            future, job = self._jobs.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)
            self._jobs.task_done()
            del future, job  # else the last answer would be kept while the next is waited for
