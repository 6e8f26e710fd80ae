"""What the tests of `lsg serve` share: a server in a thread, the client of the package `openai`, and images as it sends."""

import base64
import contextlib
import io
import threading
import time

import openai
from PIL import Image

from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import scene_question
from lsg_jax.serve.question import Limits
from lsg_jax.serve.server import chat_server, make_app
from lsg_jax.web import bind, web_server

NAME = "tiny"
LIMITS = Limits(max_length=2048, max_new_tokens=64)


def scene(index, side=64):
    """A drawn scene as PNG."""
    out = io.BytesIO()
    Image.fromarray(draw(scene_question("validation", index).scene, side)).save(out, "png")
    return out.getvalue()


def shown(png):
    """An image part."""
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png).decode()}}


def written(text):
    """A text part."""
    return {"type": "text", "text": text}


def asked(prompt, *pngs):
    """Messages of one question about images."""
    return [{"role": "user", "content": [*map(shown, pngs), written(prompt)]}]


@contextlib.contextmanager
def running(server, token=None, grace=5):
    """The address of a server that answers in a thread of this process."""
    with bind(0) as listening:
        web = web_server(make_app(server, token), grace=grace)
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            web.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


class Served:
    """A started server of a model, its address and its clients. `ask` gives the reply to a question."""

    def __init__(self, server, url):
        self.server, self.url = server, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(self, messages, **fields):
        if "lsg" in fields:
            fields["extra_body"] = {"lsg": fields.pop("lsg")}
        return self.client.chat.completions.create(model=NAME, messages=messages, **fields)

    def text(self, messages, **fields):
        return self.ask(messages, **fields).choices[0].message.content

    def stream(self, messages, **fields):
        """The pieces of a streamed answer."""
        return [part.choices[0].delta.content or "" for part in self.ask(messages, stream=True, **fields) if part.choices]

    def counted(self, name, **labels):
        """A counter of the metrics."""
        text = self.server.metrics.text().decode()
        marks = ",".join(f'{key}="{value}"' for key, value in labels.items())
        lines = [line for line in text.splitlines() if line.startswith(f"{name}{{{marks}}} " if labels else f"{name} ")]
        return float(lines[0].split()[1]) if lines else 0.0

    def wait_until_idle(self):
        until = time.monotonic() + 60
        while not self.server.engine.idle:
            assert time.monotonic() < until
            time.sleep(0.01)


@contextlib.contextmanager
def served(vlm, limits=LIMITS, *, waits_for=0, **settings):
    """A server of a model; see Served. It answers nothing before so many questions are waiting."""
    server = chat_server(vlm, limits, name=NAME, **settings)

    def start():
        until = time.monotonic() + 60
        while len(server.engine._waiting) < waits_for and time.monotonic() < until:
            time.sleep(0.005)
        server.engine.start()

    threading.Thread(target=start, daemon=True).start()
    with server.metrics.compilations(), running(server) as url:
        yield Served(server, url)
