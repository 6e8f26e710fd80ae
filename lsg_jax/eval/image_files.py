"""Images of benchmarks whose owners publish them as files beside the questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsg_jax.data.decoding import MAX_FILE
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Item
from lsg_jax.files import is_file, read_regular


@dataclass(frozen=True)
class ImageFile:
    """An image file."""

    path: Path

    @property
    def where(self) -> str:
        """For error messages."""
        return str(self.path)

    def read(self) -> bytes:
        """The encoded file. Raises InputError that names it."""
        return read_regular(self.path, limit=MAX_FILE)


def image_file(name: str, folders: Sequence[Path]) -> ImageFile:
    """The image of that name in the first of the folders that has it, else in the last."""
    paths = [folder / name for folder in folders]
    return ImageFile(next((path for path in paths if is_file(path)), paths[-1]))


def check_folder(path: str, file: str) -> None:
    """Raises InputError for a folder that has neither the owner's `file` nor a Parquet file."""
    folder = Path(path)
    if folder.is_dir() and not any(folder.rglob("*.parquet")):
        raise InputError(f"{path}: neither {file} nor a Parquet file in it")


def with_their_images(items: Sequence[Item], where: str) -> list[Item]:
    """The items whose image files exist, and those without images: a folder of some images makes a partial run.

    Raises:
        InputError: there are no items, or images that they need, but none of these exists.
    """
    if not items:
        raise InputError(f"{where}: no questions in it")
    kept = [item for item in items if all(isinstance(image, ImageFile) and is_file(image.path) for image in item.images)]
    expected = next((image for item in items for image in item.images), None)
    if expected is not None and not any(item.images for item in kept):
        raise InputError(f"{where}: no image of its questions is there, such as {getattr(expected, 'path', '')}")
    return kept
