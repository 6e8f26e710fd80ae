"""A request and its images -> tokens and pixels of one model."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from lsg_jax.data.conversation import IMAGE_TAG, RecordError, Turn
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.processor import Processor
from lsg_jax.data.record_shapes import tags_in_front
from lsg_jax.data.rows import Pixels
from lsg_jax.errors import InputError
from lsg_jax.serve.pictures import Picture, refused_image
from lsg_jax.serve.request import ChatRequest, Message, Refused


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_length: tokens of a prompt, its images included, and of its answer together.
        max_new_tokens: tokens of an answer.
        max_images: of one request.
        max_pixels: of one image.
        max_body: bytes of a request.
    """

    max_length: int
    max_new_tokens: int
    max_images: int = 16
    max_pixels: int = 50_000_000
    max_body: int = 32 << 20


@dataclass(frozen=True)
class Question:
    """What the model is asked.

    Attributes:
        pixels: of the images; None without any.
        max_tokens: of the answer.
        seed: of draws.
    """

    encoded: Encoded
    pixels: Pixels | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]


def question(request: ChatRequest, pictures: Sequence[Picture], processor: Processor, limits: Limits) -> Question:
    """Tokenizes a request, and prepares its images.

    Raises:
        Refused: the template or the model does not take these messages or images, or they are too long.
    """
    system = [message.text.strip() for message in request.messages if message.role == "system"]
    turns = [_turn(message) for message in request.messages if message.role != "system"]
    try:
        encoded = processor.encode(
            turns,
            None,
            system="\n\n".join(system) if system else None,
            image_sizes=[picture.size for picture in pictures],
            max_length=limits.max_length - 1,
        )
    except RecordError as error:
        too_long = error.reason in ("prompt_too_long", "image_truncated")
        code = "context_length_exceeded" if too_long else "invalid_value"
        raise Refused(400, f"messages: {error}", param="messages", code=code) from None
    return Question(
        encoded,
        _pixels(pictures, processor),
        max_tokens=_max_tokens(request.max_tokens, len(encoded.ids), limits),
        temperature=request.temperature,
        top_p=request.top_p,
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        stop=request.stop,
    )


def _pixels(pictures: Sequence[Picture], processor: Processor) -> Pixels | None:
    """The images as the model takes them; None without any. One is decoded at a time, and its memory counts (`use_image`)."""
    made = []
    for number, picture in enumerate(pictures, 1):
        try:
            made.append(processor.pixels(picture.file, alone=len(pictures) == 1))
        except InputError as error:
            raise refused_image(number, error) from None
    return processor.together(made)


def _turn(message: Message) -> Turn:
    """A message as a turn; an image is a tag, and the only one of a turn is at its start (`conversation.Turn`)."""
    if message.role == "assistant":
        return Turn("gpt", message.text.strip())
    if IMAGE_TAG in message.text:
        problem = f"messages: the text contains {IMAGE_TAG}, which marks an image here: leave it out, and send image parts"
        raise Refused(400, problem, param="messages", code="invalid_value")
    images = len(message.images)
    in_front = all(kind == "image" for kind, _ in message.parts[:images])
    if images == 1 or (images and in_front):
        return Turn("human", tags_in_front(message.text, images))
    return Turn("human", "".join(f"{IMAGE_TAG}\n" if kind == "image" else value for kind, value in message.parts).strip())


def _max_tokens(asked: int | None, prompt: int, limits: Limits) -> int:
    """Tokens of an answer, as many as fit where nothing is asked."""
    left = limits.max_length - prompt
    if asked is None:
        return min(left, limits.max_new_tokens)
    if asked > limits.max_new_tokens:
        raise Refused(
            400,
            f"max_tokens: {asked:,} is asked for, {limits.max_new_tokens:,} is the most",
            param="max_tokens",
            code="invalid_value",
        )
    if asked > left:
        problem = (
            f"the prompt has {prompt:,} tokens, and {asked:,} more are asked for: {limits.max_length:,} is the most together"
        )
        raise Refused(400, f"max_tokens: {problem}", param="max_tokens", code="context_length_exceeded")
    return asked
