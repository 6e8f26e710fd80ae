"""Questions in batches of few shapes. Images are read in threads and once a batch, and only those of a few batches are held.

Where the number of an image's tokens depends on its size (tiles), the image is read before its question is tokenized; otherwise
only by the process that computes its row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from jax.sharding import Mesh
from PIL import Image

from lsg_jax.data.conversation import RecordError
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.images import image_size
from lsg_jax.data.layout import ImageSize, depends_on_size
from lsg_jax.data.processor import Processor
from lsg_jax.data.rows import Pixels
from lsg_jax.data.sources import in_order
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Item
from lsg_jax.sharding import local_rows
from lsg_jax.vlm import PROMPT_BUCKET

READ_AHEAD = 2  # batches whose pixels are made while another is computed


class Bucket(NamedTuple):
    """What the questions of a batch have in common.

    Attributes:
        tiles, patches: of each row (`Encoded`); no patches for squares.
        length: tokens that prompts are padded to.
    """

    tiles: int
    patches: int
    length: int


Images = Sequence[bytes | Image.Image]
Encode = Callable[[int, Sequence[ImageSize]], Encoded]
"""(position of a question, sizes of its images) -> its tokens."""


@dataclass(frozen=True)
class Asked:
    """A tokenized question.

    Attributes:
        images: as they were read; None if they are still to be read.
    """

    position: int
    encoded: Encoded
    images: Images | None = None


@dataclass(frozen=True)
class QuestionBatch:
    """Questions of one bucket of tiles, patches and length.

    Attributes:
        bucket: of all of them.
        members: position of the question in each row of the global batch; the last rows may repeat the first.
        encoded: position -> tokens.
        pixels: of the images of this process's rows (`Processor.all_pixels`); None for a question without an image.
    """

    bucket: Bucket
    members: list[int]
    encoded: dict[int, Encoded]
    pixels: list[Pixels | None]


def batches(
    processor: Processor,
    items: Sequence[Item],
    which: Iterable[int],
    encode: Encode,
    *,
    size: Callable[[Bucket], int],
    mesh: Mesh | None,
    threads: int,
    known: Container[int] = (),
) -> Iterator[QuestionBatch]:
    """The questions `which` in batches of exactly the size of their bucket, the same in every process.

    Args:
        mesh: that the batches are placed on; pixels are read of the rows of this process alone.
        known: a batch of these alone is left out. So a resumed run computes the same batches, and rounds in the same way.

    Raises:
        InputError: an image cannot be read; names the question. Whatever `encode` raises; without tiles, before any batch.
    """

    def ask(position: int) -> Asked:
        images = read_images(items[position])
        return Asked(position, encode(position, _sizes(items[position], images)), images)

    if depends_on_size(processor.image):
        asked: Iterable[Asked] = in_order(ask, which, threads)
    else:
        asked = [Asked(i, encode(i, (processor.square,) * len(items[i].images))) for i in which]
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[list[Asked], list[Future[Pixels | None]]]] = deque()
        try:
            for members in plan(asked, size):
                if all(member.position in known for member in members):
                    continue
                rows = local_rows(mesh, len(members))
                here = {members[row].position: members[row] for row in rows}
                once = {i: pool.submit(item_pixels, processor, items[i], one.images) for i, one in here.items()}
                waiting.append((members, [once[members[row].position] for row in rows]))
                if len(waiting) > READ_AHEAD:
                    yield _ready(*waiting.popleft())
            while waiting:
                yield _ready(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _ready(members: list[Asked], pixels: list[Future[Pixels | None]]) -> QuestionBatch:
    encoded = {one.position: one.encoded for one in members}
    return QuestionBatch(
        bucket_of(members[0].encoded), [one.position for one in members], encoded, [future.result() for future in pixels]
    )


def bucket_of(encoded: Encoded) -> Bucket:
    """The bucket of a question."""
    return Bucket(encoded.tiles, encoded.patches, -(-len(encoded.ids) // PROMPT_BUCKET) * PROMPT_BUCKET)


def plan(asked: Iterable[Asked], size: Callable[[Bucket], int]) -> Iterator[list[Asked]]:
    """Batches of exactly the size of their bucket, as soon as they are full.

    Those that are left over come last; each is filled up with its first question.
    """
    buckets: dict[Bucket, list[Asked]] = {}
    for one in asked:
        bucket = bucket_of(one.encoded)
        members = buckets.setdefault(bucket, [])
        members.append(one)
        if len(members) == size(bucket):
            yield members.copy()
            members.clear()
    for bucket, members in sorted(buckets.items()):
        if members:
            yield members + members[:1] * (size(bucket) - len(members))


def encode_item(processor: Processor, item: Item, prompt: str, sizes: Sequence[ImageSize], max_length: int | None) -> Encoded:
    """The tokens of a question. Raises InputError that names the item, if it is too long or its tags are not its images."""
    try:
        return processor.encode_question(prompt, image_sizes=sizes, max_length=max_length)
    except RecordError as error:
        raise unusable(item, error) from None


def unusable(item: Item, error: RecordError) -> InputError:
    """The error of a question that cannot be asked, with what to do if it is too long."""
    too_long = error.reason in ("prompt_too_long", "image_truncated", "nothing_supervised")
    return InputError(f"question {item.id}: {error}{'; raise eval.max_length' if too_long else ''}")


def read_images(item: Item) -> Images:
    """The images of an item, as they are stored. Raises InputError that names the item."""
    try:
        return [image.read() for image in item.images]
    except InputError as error:
        raise InputError(f"question {item.id}: {error}") from None


def _unreadable(item: Item, error: InputError) -> InputError:
    """The error of an image that was read but is none, with the places where the images of the question are."""
    places = ", ".join(dict.fromkeys(where for image in item.images if (where := getattr(image, "where", ""))))
    return InputError(": ".join(filter(None, (f"question {item.id}", places, str(error)))))


def _sizes(item: Item, images: Images) -> list[ImageSize]:
    try:
        return [image.size if isinstance(image, Image.Image) else image_size(image) for image in images]
    except InputError as error:
        raise _unreadable(item, error) from None


def item_pixels(processor: Processor, item: Item, images: Images | None = None) -> Pixels | None:
    """The pixels of an item's images (`Processor.all_pixels`); None without one. Raises InputError that names the item.

    Args:
        images: what `read_images` returned, if they have been read.
    """
    images = read_images(item) if images is None else images
    try:
        return processor.all_pixels(images)
    except InputError as error:
        raise _unreadable(item, error) from None
