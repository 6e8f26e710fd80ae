"""Answers questions in batches, on one thread. Who asks is told of new tokens, and may leave at any time.

An answer is that of the question asked alone. Rounding errors differ with the shape of the batch, and could decide where two
tokens are as close as that: such an answer is computed again from there on, in a batch of its own (as by `eval.answering`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lsg_jax.checkpoint.processes import host_array
from lsg_jax.config import EvalConfig
from lsg_jax.data.processor import Processor
from lsg_jax.errors import LsgError
from lsg_jax.eval.answering import near_tie_of
from lsg_jax.serve.answer_text import AnswerText
from lsg_jax.serve.batching import Shape, make_batch, rows_for, shape_of
from lsg_jax.serve.metrics import Metrics
from lsg_jax.serve.programs import Made, begin, go_on
from lsg_jax.serve.question import Question
from lsg_jax.serve.request import Refused
from lsg_jax.sharding import batch_rows, place_rows
from lsg_jax.vlm import VLM

logger = logging.getLogger(__name__)

STEPS = 8  # tokens of each answer between two looks at who has left and what may be sent
LINGER = 0.01  # seconds that a first question waits for others: those sent with it take some to read
LONGEST_RETRY = 60  # seconds after which a refused client is told to come back, at most


@dataclass(frozen=True)
class Model:
    """A model under a method.

    Attributes:
        name: equal for requests that may share a batch: the method, and its coefficients.
    """

    name: Hashable
    vlm: VLM
    processor: Processor


@dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    Attributes:
        text: to be appended; may be empty.
        tokens: of the answer so far.
        finish: why the answer has ended (`AnswerText.finish`); None if it goes on.
    """

    text: str
    tokens: int
    finish: str | None = None


@dataclass(eq=False)
class Ticket:
    """A place in the queue, then a question, then its answer. All but `tell` belongs to the engine.

    Attributes:
        tell: called on the engine's thread with each Piece, or with what the answer failed with.
        state: `waiting`, `running`, `again` (to be computed again) or `closed`.
        at: tokens that its batch has computed of it.
    """

    tell: Callable[[Piece | Refused], None]
    state: str = "waiting"
    model: Model | None = None
    question: Question | None = None
    shape: Shape | None = None
    answer: AnswerText | None = None
    at: int = 0


class Engine:
    """The queue, and the thread that answers what is in it.

    Args:
        batch_size: questions that are answered at a time, at most.
        max_new_tokens: of an answer, at most.
        max_waiting: requests that wait, beside those that are answered.
        near_tie: as EvalConfig.near_tie; None for its default of the model.
    """

    def __init__(
        self,
        vlm: VLM,
        metrics: Metrics,
        *,
        batch_size: int,
        max_new_tokens: int,
        max_waiting: int,
        near_tie: float | None = None,
    ):
        self.batch_size, self.max_new_tokens, self.max_waiting, self.metrics = batch_size, max_new_tokens, max_waiting, metrics
        self.near_tie = near_tie_of(vlm, EvalConfig(near_tie=near_tie))
        self._changed = threading.Condition()
        self._places = 0  # tickets that wait, of which some have no question yet
        self._waiting: deque[Ticket] = deque()
        self._again: deque[Ticket] = deque()  # to be answered in a batch of their own
        self._running = 0
        self._shards = batch_rows(vlm.mesh)
        self._seconds = 1.0  # that a batch takes, of late

    def start(self) -> None:
        """Starts answering. The thread is a daemon: a server that has to end does not wait for a compilation."""
        threading.Thread(target=self._run, name="answers", daemon=True).start()

    # Called by the server's thread.

    def admit(self, tell: Callable[[Piece | Refused], None]) -> Ticket:
        """A place in the queue. Refused with status 429 if there is none."""
        with self._changed:
            if self._places >= self.max_waiting:
                after = math.ceil(min(max(1.0, self._seconds * self._places / self.batch_size), LONGEST_RETRY))
                raise Refused(
                    429,
                    f"{self.max_waiting} requests are waiting: ask again in some seconds",
                    code="queue_full",
                    headers={"retry-after": str(after)},
                )
            self._places += 1
            self.metrics.waiting.set(self._places)
        return Ticket(tell)

    def ask(self, ticket: Ticket, model: Model, question: Question) -> None:
        """Queues a question."""
        ticket.model, ticket.question = model, question
        ticket.shape = shape_of(question, self.max_new_tokens)
        ticket.answer = AnswerText(model.processor, question.stop, question.max_tokens)
        with self._changed:
            if ticket.state == "waiting":
                self._waiting.append(ticket)
                self._changed.notify_all()

    def leave(self, ticket: Ticket) -> None:
        """Gives up the place of a ticket: its client has gone, or has all it wanted."""
        with self._changed:
            self._close(ticket)

    @property
    def idle(self) -> bool:
        """Whether nothing is answered, and nothing waits."""
        with self._changed:
            return not (self._places or self._running or self._again)

    # The thread.

    def _close(self, ticket: Ticket) -> None:
        """Needs the lock."""
        if ticket.state == "waiting":
            self._places -= 1
            self.metrics.waiting.set(self._places)
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        ticket.state = "closed"

    def _run(self) -> None:
        while True:
            members = self._next()
            started = time.monotonic()
            try:
                self._answer(members)
            except Exception as error:
                failure = _failure(error)
                for ticket in members:
                    self._fail(ticket, failure)
            with self._changed:
                self._running = 0
                self._seconds = 0.8 * self._seconds + 0.2 * (time.monotonic() - started)
                self.metrics.running.set(0)
            del members  # else the last batch would be kept while the next is waited for

    def _next(self) -> list[Ticket]:
        """Waits for questions, and takes the oldest with those that may share its batch."""
        with self._changed:
            while True:
                while not (self._again or self._waiting):
                    self._changed.wait()
                if not self._again and len(self._waiting) < self.batch_size:
                    self._linger()
                if self._again:
                    members = [self._again.popleft()]
                elif self._waiting:
                    members = self._alike()
                else:
                    continue  # they have left
                members = [ticket for ticket in members if ticket.state != "closed"]
                if not members:
                    continue
                for ticket in members:
                    if ticket.state == "waiting":
                        self._places -= 1
                    ticket.state, ticket.at = "running", 0
                self._running = len(members)
                self.metrics.waiting.set(self._places)
                self.metrics.running.set(self._running)
                return members

    def _linger(self) -> None:
        """Gives others a moment to come. Needs the lock."""
        until = time.monotonic() + LINGER
        while len(self._waiting) < self.batch_size and (left := until - time.monotonic()) > 0:
            self._changed.wait(left)

    def _alike(self) -> list[Ticket]:
        """Takes the oldest question, and others of its model and shape, as many as a batch holds. Needs the lock."""
        key = _key(self._waiting[0])
        members = [ticket for ticket in self._waiting if _key(ticket) == key][: self.batch_size]
        for ticket in members:
            self._waiting.remove(ticket)
        return members

    def _answer(self, members: Sequence[Ticket]) -> None:
        """Answers questions of one model and shape."""
        model, shape = members[0].model, members[0].shape
        questions = [ticket.question for ticket in members if ticket.question is not None]
        assert model is not None and shape is not None
        rows, vlm = rows_for(len(members), self.batch_size, of=self._shards), model.vlm
        batch, choosing = place_rows(make_batch(model.processor, questions, shape, rows), vlm.mesh, rows)
        self.metrics.batch_rows.observe(len(members))
        running, made = begin(vlm.params, batch, choosing, vlm.graphdef, shape.room)
        while True:
            self._take(members, made, several=rows > self._shards)
            stopped = np.ones(rows, bool)
            stopped[: len(members)] = [ticket.state != "running" for ticket in members]
            if stopped.all():
                return
            running, made = go_on(vlm.params, running, choosing, stopped, vlm.graphdef, STEPS)

    def _take(self, members: Sequence[Ticket], made: Made, *, several: bool) -> None:
        """Tells of new tokens. `several`: the batch has several rows on a device."""
        count = int(host_array(made.count))
        tokens, margins = host_array(made.tokens)[:, :count], host_array(made.margin)[:, :count]
        close = np.isnan(margins) | (margins < (self.near_tie if several else 0.0))
        for row, ticket in enumerate(members):
            if ticket.state != "running" or ticket.answer is None:
                continue
            start = max(0, len(ticket.answer.tokens) - ticket.at)  # where it is computed again, the first ones are known
            ticket.at += count
            sound = next((column for column in range(start, count) if close[row, column]), count)
            fresh = tokens[row, start:sound].tolist()
            text = ticket.answer.add(fresh) if fresh else ""
            if text or ticket.answer.finish:
                self._tell(ticket, Piece(text, len(ticket.answer.tokens), ticket.answer.finish))
            if ticket.answer.finish is None and sound < count:
                if math.isnan(margins[row, sound]):
                    self._fail(ticket, Refused(500, "the model computes NaN or infinity for this question", code="not_finite"))
                else:
                    self._repeat(ticket)

    def _tell(self, ticket: Ticket, piece: Piece) -> None:
        if piece.finish:
            with self._changed:
                self._close(ticket)
        ticket.tell(piece)

    def _fail(self, ticket: Ticket, failure: Refused) -> None:
        with self._changed:
            open_ = ticket.state != "closed"
            self._close(ticket)
        if open_:
            ticket.tell(failure)

    def _repeat(self, ticket: Ticket) -> None:
        """Has the answer computed again, from the token on where two were too close, in a batch of its own."""
        self.metrics.near_ties.inc()
        with self._changed:
            if ticket.state == "running":
                ticket.state = "again"
                self._again.append(ticket)


def _key(ticket: Ticket) -> Hashable:
    """Equal for tickets that may share a batch."""
    assert ticket.model is not None
    return ticket.model.name, ticket.shape


def _failure(error: Exception) -> Refused:
    """What clients are told of an error of a batch. Its reason goes to the log alone: it may name paths."""
    reason = " ".join(str(error).split())[:500]
    logger.error("lsg serve: a batch failed: %s: %s", type(error).__name__, reason)
    told = reason if isinstance(error, LsgError) else f"{type(error).__name__}, the server's log says why"
    return Refused(500, f"the model failed: {told}", code="model_failed")
