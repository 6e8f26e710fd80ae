"""Opens what is to be converted: a checkpoint in the Hugging Face or an original layout, or a trained part and its base.

However it is stored, it comes out in the Hugging Face layout: small files in a folder, and tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from converters.adapters import (
    adapter_beside_a_model,
    base_named_by,
    derived_tensors,
    part_of_a_model,
    read_trained,
    with_replaced,
    with_updates,
)
from converters.derived_source import DerivedSource
from converters.hf_config import find_family, ignored_fields
from converters.hub import SMALL_FILES, Checkpoint
from converters.layouts import original_layout
from converters.layouts.tokens import has_tokenizer, is_sentencepiece_alone, open_fast_tokenizer
from converters.layouts.write_twin import Original, write_twin
from converters.reader import Source, open_source
from converters.trained_files import take_files_of_part
from lsg_jax.errors import CheckpointError, InputError
from lsg_jax.files import scratch_folder
from lsg_jax.json_files import read_object


@dataclass(frozen=True)
class Opened:
    """A checkpoint in the Hugging Face layout.

    Attributes:
        folder: where its small files are (`copy_small_files`).
        weights: its tensors.
        ignored: what of the original was dropped -> why.
    """

    folder: Path
    weights: Source
    ignored: dict[str, str] = field(default_factory=dict)


@contextmanager
def open_checkpoint(checkpoint: Checkpoint, base: Checkpoint | None, target: Path) -> Iterator[Opened]:
    """Opens a checkpoint, or a trained part of one and its base.

    Args:
        target: what is to be made of it; small files that are made on the way lie beside it.

    Raises:
        InputError: files are missing, damaged or do not belong together. ConfigError: a setting is not supported.
    """
    with ExitStack() as stack:
        part = part_of_a_model(checkpoint.folder, adapter_first=base is not None)
        _check_base(checkpoint, part, base)
        whole = base or checkpoint
        config_file = _config_file(checkpoint.folder, whole.folder)
        config = read_object(config_file)
        layout = original_layout(config)
        if layout is None:
            ignored_fields(config, where=str(config_file))  # refuses a configuration before the weights are opened
        weights = stack.enter_context(closing(open_source(whole.folder)))
        trained = read_trained(checkpoint.folder) if part else None
        for source in trained.opened if trained else ():
            stack.enter_context(closing(source))
        if layout is None and trained is None and not is_sentencepiece_alone(whole.folder):
            yield Opened(checkpoint.folder, weights)
            return
        work = stack.enter_context(scratch_folder(target, "hf"))
        copy_small_files(whole.folder, work)
        twin = layout.twin(config, str(config_file)) if layout is not None else None
        if part:
            take_files_of_part(checkpoint.folder, whole.folder, work, config, twin)
        if layout is not None and twin is not None:
            twins, ignored = write_twin(Original(checkpoint.folder, layout, twin, weights, trained), work, stack)
            yield Opened(work, twins, ignored)
            return
        if is_sentencepiece_alone(work):
            of = checkpoint.folder if has_tokenizer(checkpoint.folder) else whole.folder
            open_fast_tokenizer(work, of).save_pretrained(work)
        if trained is None:
            yield Opened(work, weights)
            return
        canonical = find_family(config, str(config_file)).canonical_name
        tensors = derived_tensors(weights, canonical, whole.folder)
        merged = with_updates(with_replaced(tensors, trained, canonical), trained, canonical, checkpoint.folder)
        stored = {tensors[name].name if name in tensors else name: derived for name, derived in merged.items()}
        yield Opened(work, DerivedSource(stored, (weights, *trained.opened)))


def _check_base(checkpoint: Checkpoint, part: str | None, base: Checkpoint | None) -> None:
    folder = checkpoint.folder
    if part is None and (beside := adapter_beside_a_model(folder)):
        remedy = f"move one of them elsewhere, or merge the adapter: --base {base_named_by(folder)}"
        raise InputError(f"{folder}: holds a whole model and an adapter ({beside}); {remedy}")
    if part and base is None:
        raise InputError(f"{folder}: holds {part}, not a whole model; name its base: --base {base_named_by(folder)}")
    if base is None:
        return
    if part is None:
        raise InputError(f"{folder}: holds no adapter and no projector alone, so nothing to merge; leave --base out")
    if other := part_of_a_model(base.folder):
        raise InputError(f"{base.folder}: the base holds {other}, not a whole model")
    if beside := adapter_beside_a_model(base.folder):
        raise InputError(f"{base.folder}: the base holds a whole model and an adapter ({beside}); move one of them elsewhere")


def _config_file(folder: Path, whole: Path) -> Path:
    """The config.json that describes the model: LLaVA writes one beside what it trained, PEFT does not."""
    own = folder / "config.json"
    if folder != whole and not (own.is_file() and original_layout(read_object(own))):
        return whole / "config.json"
    return own


def copy_small_files(folder: Path, target: Path) -> None:
    """Copies what a model needs besides its weights, without code. Raises CheckpointError if that fails."""
    for path in sorted({path for pattern in SMALL_FILES for path in folder.glob(pattern)}):
        if not path.is_file() or path.suffix in (".py", ".safetensors", ".bin"):
            continue
        copy = target / path.relative_to(folder)
        try:
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be copied to {copy.parent}: {error.strerror}") from None
