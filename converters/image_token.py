"""The image token of a checkpoint: its processor writes the prompts, so it decides which token stands for an image."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from converters.layouts.tokens import has_tokenizer
from lsg_jax.config import ModelConfig
from lsg_jax.data.processor_files import image_token_id, open_tokenizer, read_image_token

logger = logging.getLogger(__name__)


def with_image_token(config: ModelConfig, folder: Path, where: Path) -> ModelConfig:
    """The configuration with the id that the checkpoint's tokenizer has for the image token of its processor.

    The id of config.json stays where the tokenizer has no such token, or the folder has no tokenizer.

    Args:
        folder: holds the tokenizer and `processor_config.json`. where: the checkpoint's folder, for messages.

    Raises:
        InputError: the tokenizer or `processor_config.json` cannot be read.
    """
    if not has_tokenizer(folder):
        return config
    tokenizer = open_tokenizer(folder)
    token = read_image_token(folder, tokenizer, config.image_token_id, tag=config.image.tag)
    index = image_token_id(tokenizer, token)
    if index in (None, config.image_token_id):
        return config
    stated = f"config.json states image token {config.image_token_id}"
    logger.warning("%s: %s, but the processor writes %s, which is token %d; that one is taken", where, stated, token, index)
    return dataclasses.replace(config, image_token_id=index)
