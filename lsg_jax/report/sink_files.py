"""Writes the result folder of `lsg sinks`.

sinks.json, figures     in the folder itself
marked/, images/, maps/     each image with its sinks marked, as it is, and where its answer looks: `file`.png in all three
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lsg_jax.data.images import open_image, to_rgb
from lsg_jax.errors import InputError
from lsg_jax.files import check_only, write_atomic
from lsg_jax.json_files import write_sealed
from lsg_jax.report.drawing import painted
from lsg_jax.report.figures import draw_attention_shares, draw_sinks_by_layer
from lsg_jax.report.maps import TITLES, AnswerMaps, answer_maps, bar_colours, telling_layer
from lsg_jax.report.overlay import L_SINK, V_SINK, draw_map, draw_sinks, l_sinks

MARKED, PLAIN, MAPS = "marked", "images", "maps"
"""Subfolders: the images with their sinks marked, as they are, for the report, and their maps."""

FIGURES = ("sinks_by_layer", "attention_shares")
KNOWN = frozenset(
    {"sinks.json", MARKED, PLAIN, MAPS, *(f"{name}.{suffix}" for name in FIGURES for suffix in ("csv", "svg", "png"))}
)
WRITER = "lsg sinks"
"""What pictures in the subfolders state as their software: only such are replaced or removed."""

PLAIN_SIDE, MAP_SIDE = 448, 384  # pixels
MAP_DOTS_PER_INCH = 100  # photographs would make larger files


def file_stems(names: Iterable[str]) -> dict[str, str]:
    """The stem of the files of each image; images of the same stem in several folders are numbered."""
    stems: dict[str, str] = {}
    for name in names:
        stem, number = Path(name).stem, 2
        while stem in stems.values():
            stem, number = f"{Path(name).stem}-{number}", number + 1
        stems[name] = stem
    return stems


def check_layer(layer: int | None, layers: int) -> None:
    """Raises InputError if the model has no such decoder layer."""
    if layer is not None and not 0 <= layer < layers:
        raise InputError(f"--layer {layer}: the model has layers 0 to {layers - 1}")


def check_folder(out: Path, images: Iterable[object]) -> None:
    """Refuses an output folder in which the user's own files could be overwritten.

    Args:
        images: those that are looked at; the ones that are no paths are passed over.

    Raises:
        InputError: one of the images lies in the folder, or it holds files that `write_sinks` did not write.
    """
    for image in images:
        if isinstance(image, (str, Path)) and Path(image).resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out}: holds {image}, one of the images; choose another output")
    check_only(out, KNOWN, f"folder of {WRITER}")
    for folder in (out / MARKED, out / PLAIN, out / MAPS):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file, and a folder is written; choose another output")
        if strange := [path for path in _within(folder) if not _written(path)]:
            raise InputError(f"{folder}: holds {strange[0].name}, which {WRITER} did not write; choose another output")


def _within(folder: Path) -> list[Path]:
    """What a subfolder holds, without hidden files of the system."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if path.suffix == ".png" or not path.name.startswith(".")]


def _written(path: Path) -> bool:
    """Whether a file is a picture of `write_sinks`: PNG states the software before the pixels."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b"Software\0" + WRITER.encode() in file.read(1024)


def write_sinks(
    found: dict[str, Any],
    images: Mapping[str, Image.Image | bytes | str | Path],
    out: Path,
    *,
    layer: int | None = None,
) -> dict[str, Any]:
    """Writes a result of `analysis.sinks.find_sinks` on `images` into the folder `out`; sinks.json comes last.

    Args:
        layer: of the maps; None for the one in which sinks draw most of the attention.

    Returns:
        What sinks.json holds: `found`, and with each image its `file`.

    Raises:
        InputError: the folder holds files of another kind, or one of the images.
    """
    check_folder(out, images.values())
    (out / "sinks.json").unlink(missing_ok=True)  # an interrupted command leaves no numbers beside other pictures
    for folder in (out / MARKED, out / PLAIN, out / MAPS):
        folder.mkdir(parents=True, exist_ok=True)
        for left in _within(folder):  # of an earlier run
            left.unlink()
    stems = file_stems(found["images"])
    found = {**found, "images": {name: {"file": stems[name], **entry} for name, entry in found["images"].items()}}
    maps = {name: of for name, entry in found["images"].items() if (of := answer_maps(entry)) is not None}
    if layer is None and maps:
        layer = telling_layer(list(maps.values()))
    for name, stem in stems.items():
        image, entry = images[name], found["images"][name]
        opened = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        marked = draw_sinks(opened, entry)
        write_atomic(out / MARKED / f"{stem}.png", _png(marked))
        opened.thumbnail((PLAIN_SIDE, PLAIN_SIDE), Image.Resampling.LANCZOS)
        write_atomic(out / PLAIN / f"{stem}.png", _png(opened))
        if name in maps and layer is not None:
            drawn = draw_maps(opened, marked, maps[name], layer, found["prompt"], entry)
            write_atomic(out / MAPS / f"{stem}.png", drawn)
    for name, draw, rows in zip(FIGURES, (draw_sinks_by_layer, draw_attention_shares), ("counts", "attention"), strict=True):
        draw(found[rows], out / name)
    write_sealed(out / "sinks.json", found)
    return found


def _png(image: Image.Image) -> bytes:
    """PNG that states its writer."""
    out, info = io.BytesIO(), PngInfo()
    info.add_text("Software", WRITER)
    image.save(out, "png", pnginfo=info)
    return out.getvalue()


def draw_maps(
    image: Image.Image, marked: Image.Image, maps: AnswerMaps, layer: int, prompt: str, entry: Mapping[str, Any]
) -> bytes:
    """PNG: the image with its sinks, all attention of the answer in one layer, and that without sinks, with colour bars."""
    scale = MAP_SIDE / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, 1 + len(TITLES))
        for axes in panels:
            axes.set_axis_off()
        panels[0].imshow(marked)
        panels[0].set_title("sinks")
        kinds = [("V-sinks", V_SINK, entry["v_sinks"]), ("L-sinks, in some layer", L_SINK, l_sinks(entry))]
        handles = [_frame(label, colour) for label, colour, of in kinds if of]
        if handles:
            panels[0].legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=0.4)
        for axes, (name, title) in zip(panels[1:], TITLES.items(), strict=True):
            values = maps.drawn(name, layer, size)
            axes.imshow(draw_map(image, values))
            axes.set_title(title)
            _bar(figure, axes, float(values.max(initial=0.0)))
        asked = f"{prompt}  Answer: {entry['answer']}"
        figure.suptitle(asked if len(asked) <= 100 else f"{asked[:100]}\N{HORIZONTAL ELLIPSIS}", x=0.01, ha="left", fontsize=9)
        figure.supxlabel("\n".join(textwrap.wrap(maps.words(layer), 122)), x=0.01, ha="left", fontsize=8)

    tall = min(max(size[1] / size[0], 0.4), 1.6)
    return painted((7.2, 2.3 * tall + 1.25), paint, dots_per_inch=MAP_DOTS_PER_INCH, metadata={"Software": WRITER})


def _frame(label: str, colour: tuple[int, int, int]) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor="none", edgecolor=(colour[0] / 255, colour[1] / 255, colour[2] / 255), linewidth=2, label=label)


def _bar(figure: Any, axes: Any, peak: float) -> None:
    """The colour bar of one map; an empty map has none."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    if peak > 0:
        colours = ScalarMappable(Normalize(0, peak), ListedColormap(bar_colours(256) / 255))
        figure.colorbar(colours, ax=axes, location="bottom", label="times an even spread", fraction=0.05, pad=0.03)
