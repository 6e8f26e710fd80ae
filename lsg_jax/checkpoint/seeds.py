"""`RUN/seeds.json`: a method that was trained from several seeds, each of them a run folder of its own, `RUN/seed0`, ..."""

from __future__ import annotations

from pathlib import Path

from lsg_jax.errors import CheckpointError, InputError
from lsg_jax.json_files import read_sealed, write_sealed

SEEDS = "seeds.json"
FORMAT = "lsg-seeds-1"


def seed_folder(path: str | Path, seed: int) -> Path:
    """The run folder of one seed."""
    return Path(path) / f"seed{seed}"


def write_seeds(path: Path, seeds: tuple[int, ...]) -> None:
    """Makes the folder of these seeds."""
    path.mkdir(parents=True, exist_ok=True)
    write_sealed(path / SEEDS, {"format": FORMAT, "seeds": list(seeds)})


def read_seeds(path: str | Path) -> tuple[int, ...]:
    """The seeds of a folder; none if it is not one of several seeds.

    Raises:
        InputError: the file was changed, or is not as lsg writes it. CheckpointError: a format of another version.
    """
    file = Path(path) / SEEDS
    if not file.is_file():
        return ()
    content = read_sealed(file)
    if (found := content.get("format")) != FORMAT:
        raise CheckpointError(f"{file}: unknown format {found!r}, expected {FORMAT!r}")
    seeds = content.get("seeds")
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise InputError(f"{file}: not as lsg writes it: seeds is {str(seeds)[:80]}")
    return tuple(seeds)
