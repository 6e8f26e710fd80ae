"""A server whose answers are made up: only the tokenizer is a model's."""

import re
import threading

from serving import LIMITS, NAME, asked, scene, shown, written

from lsg_jax.serve.engine import Engine, Model, Piece
from lsg_jax.serve.models import Models
from lsg_jax.serve.request import Refused

TOKEN = "a-secret"
COMPLETIONS = "/v1/chat/completions"
VALID = {
    "model": NAME,
    "messages": [
        {"role": "system", "content": "Be brief."},
        *asked("What is it?", scene(0)),
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": [written("And"), shown(scene(1)), written("now?")]},
    ],
    "max_tokens": 8,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 3,
    "stop": ["x", "y"],
    "stream": False,
    "lsg": {"method": "base"},
    "n": 1,
    "user": "me",
}


class MadeModels(Models):
    """In place of the models: one without weights."""

    def __init__(self, processor):
        self.names, self.default, self.model = ["base"], "base", Model("base", None, processor)

    def choose(self, method, coefficients):
        if method not in (None, "base"):
            raise Refused(400, "lsg.method: not offered")
        return self.model


class MadeEngine(Engine):
    """Answers at once; with `held`, only when that is set."""

    def __init__(self, metrics, max_waiting=4):
        self.max_new_tokens, self.max_waiting, self.batch_size, self.metrics = LIMITS.max_new_tokens, max_waiting, 2, metrics
        self._changed, self._places, self._seconds, self.asked, self.held = threading.Condition(), 0, 1.0, [], None
        self._waiting, self._again, self._running = [], [], 0

    def ask(self, ticket, model, question):
        self.asked.append(question)

        def answer():
            if self.held is not None:
                self.held.wait(20)
            with self._changed:
                self._close(ticket)
            ticket.tell(Piece("made", 1))
            ticket.tell(Piece(" up", 2, "stop"))

        threading.Thread(target=answer, daemon=True).start()


def error_of(answer, status):
    """The error of a reply: one line in the protocol's form, of which nothing of this machine can be read."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert "\n" not in error["message"] and len(error["message"]) < 500
    assert not re.search(r"Traceback|\.py|/home|/tmp|/usr|site-packages| at 0x", error["message"]), error
    return error
