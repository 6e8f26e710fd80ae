"""A cache of compiled programs on disk, so that a resumed run starts without compiling."""

from __future__ import annotations

import logging
import os
import zlib
from pathlib import Path

from lsg_jax.errors import InputError

logger = logging.getLogger(__name__)

SWITCH = "LSG_COMPILE_CACHE"
CHECKED = "checked.json"
_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # JAX's other compression, which detects a truncated file by itself


def use_compile_cache() -> Path | None:
    """Makes JAX keep compiled programs in the user's cache folder, and returns the folder.

    Changes nothing and returns None if JAX has a cache already (JAX_COMPILATION_CACHE_DIR), with LSG_COMPILE_CACHE=off, or if
    the folder cannot be written.
    """
    import jax

    if os.environ.get(SWITCH, "").lower() == "off" or jax.config.values["jax_compilation_cache_dir"]:
        return None
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsg_jax" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        _remove_damaged(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        logger.info("compiled programs are not kept: %s; %s=off silences this line", error, SWITCH)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _remove_damaged(folder: Path) -> None:
    """Removes files truncated by a kill or a full disk, which JAX would neither read nor replace. Checks each file once."""
    from lsg_jax.json_files import read_json, write_json

    try:
        known = read_json(folder / CHECKED)
    except InputError:
        known = None
    known, sound = known if isinstance(known, dict) else {}, {}
    for path in sorted(folder.glob("*-cache")):
        try:
            status = path.stat()
            seen = [status.st_size, status.st_mtime_ns]
            if known.get(path.name) == seen or _is_whole(path):
                sound[path.name] = seen
            else:
                path.unlink()
        except FileNotFoundError:  # another command has removed it
            continue
    write_json(folder / CHECKED, sound)


def _is_whole(path: Path) -> bool:
    """Whether a file decompresses completely, checksum included."""
    stream = zlib.decompressobj()
    with path.open("rb") as file:
        if file.read(len(_ZSTANDARD)) == _ZSTANDARD:
            return True
        file.seek(0)
        try:
            while piece := file.read(1 << 20):
                stream.decompress(piece)
        except zlib.error:
            return False
    return stream.eof
