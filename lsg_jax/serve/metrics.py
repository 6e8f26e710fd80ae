"""What the server counts, in the text format of Prometheus. Numbers alone: no text, no image and no token of any request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax.monitoring
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_LATEST

from lsg_jax.progress import PROGRAM

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
COMPILED = "/jax/core/compile/backend_compile_duration"


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": registry}
        self.requests = Counter(
            "lsg_requests", "Chat completions by status of HTTP; 499: the client has gone", ["status"], **of
        )
        self.waiting = Gauge("lsg_waiting_requests", "Requests that wait for a batch", **of)
        self.running = Gauge("lsg_running_requests", "Requests of the batch that is answered", **of)
        self.prompt_tokens = Counter("lsg_prompt_tokens", "Tokens of prompts, images included", **of)
        self.new_tokens = Counter("lsg_new_tokens", "Tokens of answers", **of)
        self.batch_rows = Histogram("lsg_batch_requests", "Requests of a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **of)
        self.near_ties = Counter("lsg_near_ties", "Answers that were computed again alone", **of)
        self.seconds = Histogram(
            "lsg_request_seconds", "Seconds from a request to the end of its answer", buckets=SECONDS, **of
        )
        self.first_seconds = Histogram(
            "lsg_first_text_seconds", "Seconds from a request to its first text", buckets=SECONDS, **of
        )
        self.programs = Counter("lsg_compilations", "Programs of the model that were compiled, or read from the cache", **of)
        self.compile_seconds = Counter("lsg_compile_seconds", "Seconds of compiling, or of reading from the cache", **of)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)

    @contextlib.contextmanager
    def compilations(self) -> Iterator[None]:
        """Counts the programs of this process that are compiled inside the block."""

        def named(event: str, **_: Any) -> None:
            if event == PROGRAM:
                self.programs.inc()

        def timed(event: str, duration_secs: float, **_: Any) -> None:
            if event == COMPILED:
                self.compile_seconds.inc(duration_secs)

        jax.monitoring.register_event_listener(named)
        jax.monitoring.register_event_duration_secs_listener(timed)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_listener(named)
            jax.monitoring.unregister_event_duration_listener(timed)
