"""A file in the layout of CV-Bench with made rows: groups of unequal size, and one photo that is stored turned."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

GROUPS = [
    ("2D", "Count", "ADE20K", 5),
    ("2D", "Relation", "COCO", 9),
    ("3D", "Depth", "Omni3D", 4),
    ("3D", "Distance", "Omni3D", 3),
]
TURNED = 1  # row whose JPEG carries EXIF orientation 6


def write_cv_bench(path: Path) -> list[dict]:
    """Writes the Parquet file and gives its rows."""
    import pyarrow
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    rows: list[dict] = []
    for kind, task, source, count in GROUPS:
        for _ in range(count):
            number, choices = len(rows), [str(n) for n in range(2 + len(rows) % 3)]
            question = f"How many are there{' in the picture' * (number % 4)}?"
            listed = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=False))
            rows.append(
                {
                    "idx": number,
                    "type": kind,
                    "task": task,
                    "image": {"bytes": photo(rng, turned=number == TURNED), "path": None},
                    "question": question,
                    "choices": choices,
                    "answer": f"({'ABCD'[int(rng.integers(len(choices)))]})",
                    "prompt": f"{question} Select from the following choices.\n{listed}",
                    "source": source,
                    "source_filename": f"{number // 2}.jpg",
                }
            )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return rows


def photo(rng: np.random.Generator, *, turned: bool) -> bytes:
    """A JPEG of coloured blocks, wider than high."""
    image = Image.fromarray(rng.integers(0, 256, (3, 5, 3), np.uint8)).resize((80, 48), Image.Resampling.NEAREST)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()
