"""What an answer depends on, as digests: the question with its images, and the model with its method and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import jax
from PIL import Image

from lsg_jax.checkpoint.manifest import MANIFEST, read_manifest
from lsg_jax.checkpoint.processes import tree_sha256
from lsg_jax.config import EvalConfig, identity, to_dict
from lsg_jax.digest import bytes_sha256, file_sha256, json_sha256, text_sha256
from lsg_jax.eval.benchmark import ImageSource, Item
from lsg_jax.eval.results import MethodSettings
from lsg_jax.methods.method import BASE
from lsg_jax.vlm import VLM


class HashedImage:
    """An image that knows the sha256 of what was read last, so that an answer is kept under the image that it is about."""

    def __init__(self, source: ImageSource):
        self._source = source
        self._sha256: str | None = None

    def read(self) -> bytes | Image.Image:
        """See `ImageSource`."""
        found = self._source.read()
        if isinstance(found, bytes):
            self._sha256 = bytes_sha256(found)
        else:
            self._sha256 = bytes_sha256(f"{found.mode} {found.size} ".encode() + found.tobytes())
        return found

    @property
    def where(self) -> str:
        """The file of the image, and its row; "" for a drawn image."""
        return getattr(self._source, "where", "")

    @property
    def sha256(self) -> str:
        """Of the encoded file, or of the pixels of a drawn image; reads the image if it was not read. Errors as of `read`."""
        if self._sha256 is None:
            self.read()
        assert self._sha256 is not None
        return self._sha256


def with_hashed_images(items: Sequence[Item]) -> list[Item]:
    """The items with images that know their digests."""
    return [replace(item, images=tuple(map(HashedImage, item.images))) for item in items]


def question_sha256(item: Item, prompt: str) -> str:
    """sha256 of all that an answer depends on of its question: the prompt and the images in order.

    Raises:
        InputError: an image was not read before, and cannot be.
    """
    hashed = (image if isinstance(image, HashedImage) else HashedImage(image) for image in item.images)
    return json_sha256([text_sha256(prompt), *(image.sha256 for image in hashed)])


def meaning_of(model: VLM, config: EvalConfig, *, max_new_tokens: int) -> dict[str, Any]:
    """All that an answer depends on besides its question, as plain data.

    Versions and the kind of device are part of it, so that what a result states of them is true of each of its answers. The
    number of devices, the batch size and threads are not: answers do not depend on them (`answering`). The sink settings of a
    model without a method change nothing and are left out.
    """
    return {
        **_digests(model),
        "dtypes": sorted({str(leaf.dtype) for leaf in jax.tree.leaves(model.frozen)}),
        "config": identity(model.config),
        **asdict(settings_of(model)),
        "max_new_tokens": max_new_tokens,
        "max_length": config.max_length,
        "image_aspect": config.image_aspect,
        "template": config.template or model.template,
        "near_tie": config.near_tie,
        **surroundings(),
    }


def text_files(model: VLM) -> dict[str, str]:
    """sha256 of the tokenizer, processor and template files by name; they were checked when the folder was opened."""
    if model.folder is None:
        return {}
    if (model.folder / MANIFEST).is_file():
        return read_manifest(model.folder).text_files
    small = (path for path in sorted(model.folder.iterdir()) if path.suffix in (".json", ".jinja", ".model", ".txt"))
    return {path.name: file_sha256(path) for path in small}  # a model made in Python, with the files of a checkpoint


def digests_of(model: VLM) -> dict[str, Any]:
    """What a study states of its model: the digests of the weights, of the text files, and of what was trained on it.

    With `hub`, the repository and commit that this was fetched from, if it was. Answers do not depend on it.
    """
    return {**_digests(model), **({"hub": model.origin} if model.origin else {})}


def _digests(model: VLM) -> dict[str, Any]:
    trained = tree_sha256(model.trained) if model.trained else None
    return {"backbone": model.digest, "files": text_files(model), "trained": trained}


def surroundings() -> dict[str, Any]:
    """Versions and kind of device that numbers depend on."""
    return {
        "versions": {name: version(name) for name in ("lsg_jax", "jax")},
        "device": jax.devices()[0].device_kind,
    }


def settings_of(model: VLM) -> MethodSettings:
    """What the method of a model does to it."""
    changed, settings = model.method != BASE, model.method.settings
    return MethodSettings(
        gate=to_dict(model.gate) if model.gate else None,
        method={"name": type(settings).__name__, **to_dict(settings)} if changed and model.gate is None else None,
        sinks=to_dict(model.config.sinks) if changed else None,
    )
