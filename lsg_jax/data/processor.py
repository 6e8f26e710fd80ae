"""Preprocessing for one model: turns to token ids, images to pixels, and examples to a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from lsg_jax.config import Aspect, ModelConfig
from lsg_jax.data import images
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.processor_files import open_tokenizer, read_chat_template, read_image_token
from lsg_jax.data.rows import Pixels, pad_row, to_batch
from lsg_jax.data.text_processor import CHAT_TEMPLATE as CHAT_TEMPLATE
from lsg_jax.data.text_processor import TextProcessor
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.types import Batch


class Processor(TextProcessor):
    """Tokenizer, text template and image preparation of one model; see `TextProcessor` for how it is made."""

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        model: ModelConfig,
        *,
        template: str | None = None,
        image_aspect: Aspect | None = None,
        bos: bool = True,
        words: bool = False,
    ) -> Processor:
        """Opens the tokenizer, the chat template and the image token of a local folder, as `AutoProcessor` chooses them.

        No code of the checkpoint is run.

        Raises:
            InputError: the folder is missing, or its tokenizer or chat template cannot be read.
            ConfigError: as for `Processor`, or there are chat templates but no default one.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such model folder")
        tokenizer = open_tokenizer(folder)
        source = read_chat_template(folder, tokenizer) if template in (None, CHAT_TEMPLATE) else None
        token = read_image_token(folder, tokenizer, model.image_token_id, tag=model.image.tag)
        try:
            return cls(
                tokenizer,
                model,
                template=template,
                image_aspect=image_aspect,
                chat_template=source,
                image_token=token,
                bos=bos,
                words=words,
            )
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from None

    def pixels(self, image: Image.Image | bytes | str | Path, *, alone: bool = True) -> np.ndarray:
        """An image, its file, or the file's bytes -> uint8 [S, size, size, 3], the tiles of its layout; see `layouts`.

        Of a native tower, uint8 [height, width, 3].
        """
        make = lambda opened: (
            images.prepare_native(opened, self.model)
            if self.model.vision.native
            else images.prepare_tiles(opened, self.image, alone=alone)
        )
        return make(images.to_rgb(image)) if isinstance(image, Image.Image) else images.use_image(image, make)

    def all_pixels(self, shown: Sequence[Image.Image | bytes | str | Path]) -> Pixels | None:
        """The images that one example shows after each other, as `row` takes them; None for none."""
        return self.together([self.pixels(image, alone=len(shown) == 1) for image in shown])

    def together(self, pixels: list[np.ndarray]) -> Pixels | None:
        """What `pixels` makes of each image of one example, as `row` takes it; None for none."""
        if not pixels:
            return None
        return pixels if self.model.vision.native else np.concatenate(pixels)

    @property
    def blank(self) -> np.ndarray:
        """uint8 [1, size, size, 3] of zeros, what a row without an image carries, unless the tower is native."""
        return np.zeros((1, self.image.size, self.image.size, 3), np.uint8)

    def row(
        self,
        encoded: Encoded,
        pixels: Pixels | None,
        *,
        max_length: int,
        max_answer_tokens: int,
        padding_side: Literal["left", "right"] = "right",
        row_id: int = -1,
        tiles: int | None = None,
        patches: int | None = None,
    ) -> dict[str, np.ndarray]:
        """The fields of `Batch` for one example, without the batch axis; `patches` for its images.

        Args:
            pixels: of its images, as `all_pixels` makes them; None for none.
            tiles: what S is padded to; None for `encoded.tiles`.
            patches: what P of a native tower is filled up to; None for `encoded.patches`.

        Raises:
            InputError: the example is longer than `max_length`, its answer longer than `max_answer_tokens`, or its pixels are
                not those of its image tokens.
        """
        layouts = self.layouts(encoded.image_sizes)
        if layouts and pixels is None:
            raise InputError("the prompt has image tokens, but no image was given")
        return pad_row(
            encoded,
            pixels,
            layouts,
            self.model,
            max_length=max_length,
            max_answer_tokens=max_answer_tokens,
            padding_side=padding_side,
            row_id=row_id,
            tiles=tiles,
            patches=patches,
        )

    def collate(
        self,
        encoded: Sequence[Encoded],
        pixels: Sequence[Pixels | None],
        *,
        max_length: int,
        max_answer_tokens: int,
        padding_side: Literal["left", "right"] = "right",
        row_ids: Sequence[int] | None = None,
    ) -> Batch:
        """Stacks examples into a `Batch` of numpy arrays: T = `max_length`, A = `max_answer_tokens`. See `row` for errors.

        S is the largest number of tiles of a row, P the largest number of patches.
        """
        if not encoded or len(encoded) != len(pixels):
            raise InputError(f"{len(encoded)} examples and {len(pixels)} images cannot make a batch")
        rows = [
            self.row(
                e,
                p,
                max_length=max_length,
                max_answer_tokens=max_answer_tokens,
                padding_side=padding_side,
                row_id=-1 if row_ids is None else row_ids[i],
                tiles=max(other.tiles for other in encoded),
                patches=max(other.patches for other in encoded),
            )
            for i, (e, p) in enumerate(zip(encoded, pixels, strict=True))
        ]
        return to_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]})
