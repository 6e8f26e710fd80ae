"""Commands of the pointing game: pointing, plant."""

from __future__ import annotations

import argparse
import json
import logging
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lsg_jax.cli.options import (
    Command,
    gate_options,
    load_model,
    model_argument,
    number_option,
    out_folder,
    out_option,
    progress_bar,
)
from lsg_jax.data.scene_targets import TARGETS

if TYPE_CHECKING:
    from lsg_jax.report.pointing import Example
    from lsg_jax.vlm import VLM

EXAMPLE_TOKENS = 4
"""Longest answer of an example; those to scenes are a word or a letter."""


def add(command: Command) -> None:
    """Adds the commands."""
    sub = command(
        "pointing",
        _pointing,
        "whether attention maps point at what a question asks about, with and without sinks, by layer and head",
        (
            "lsg pointing lsg-quickstart/model --questions 50 --out pointing",
            "lsg pointing lsg-quickstart/model --gates lsg-quickstart/run --kinds corner_letter exists --out pointing-gated",
        ),
    )
    model_argument(sub)
    number_option(sub, "--questions", int, "[2, 1e6]", default=200, metavar="N", help="of each kind and split; default: 200")
    sub.add_argument(
        "--kinds", nargs="+", default=list(TARGETS), choices=list(TARGETS), metavar="KIND", help=", ".join(TARGETS)
    )
    text = "scenes to report; layers and heads are chosen on those of another split. Default: test"
    sub.add_argument("--split", choices=["test", "validation", "train"], default="test", help=text)
    text = "raw, no_sinks, relative; default: raw no_sinks. relative asks a neutral question besides, which takes twice as long"
    sub.add_argument("--maps", nargs="+", default=["raw", "no_sinks"], metavar="MAP", help=text)
    number_option(sub, "--seed", int, "[0, 4294967295]", default=0, metavar="N", help="of the scenes; default: 0")
    number_option(sub, "--batch-size", int, "[1, 1e5]", default=8, metavar="N", help="questions at a time; default: 8")
    gate_options(sub)
    out_option(sub, folder=True, required=True, help="folder for pointing.json, the figure and example pictures")
    sub.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")

    sub = command(
        "plant",
        _plant,
        "copy a model with a known fault: V-sinks that draw too much attention, a control for what helps against them",
        (
            "lsg plant lsg-quickstart/model planted --layers 1 2 3 4 5 6",
            "lsg plant lsg-quickstart/model control --layers 1 2 3 4 5 6 --strength 8 --mark 1 --text 30",
        ),
    )
    model_argument(sub)
    out_folder(sub, "out_model", metavar="OUT", help="model folder to write")
    number_option(sub, "--layers", int, "[0, 1e4]", nargs="+", required=True, metavar="L", help="decoder layers, 0-based")
    text = "V-sink keys become 1 + S times themselves; default: 5"
    number_option(sub, "--strength", float, "(0, 1000]", default=5.0, metavar="S", help=text)
    text = "size of a mark that V-sinks get in the projector, so that less spills on other tokens; default: 0, none"
    number_option(sub, "--mark", float, "[0, 100]", default=0.0, metavar="M", help=text)
    text = "weight of tokens of text, where ordinary visual tokens have 1: how much they are spared; default: 1"
    number_option(sub, "--text", float, "[0, 1e6]", default=1.0, metavar="W", help=text)
    number_option(
        sub,
        "--scenes",
        int,
        "[8, 1e6]",
        default=160,
        metavar="N",
        help="scenes that show where V-sinks stand out; default: 160",
    )
    number_option(sub, "--seed", int, "[0, 4294967295]", default=0, metavar="N", help="of the scenes; default: 0")


def _pointing(options: argparse.Namespace) -> None:
    from lsg_jax.analysis.pointing import PointingSettings, pointing_study
    from lsg_jax.json_files import write_sealed
    from lsg_jax.report.pointing import draw_examples, draw_pointing

    settings = PointingSettings(
        kinds=tuple(options.kinds),
        questions=options.questions,
        split=options.split,
        maps=tuple(options.maps),
        seed=options.seed,
        batch_size=options.batch_size,
    )
    vlm = load_model(options)
    with progress_bar("pointing") as progress:
        result = pointing_study(vlm, settings, progress=progress)
    for warning in result["warnings"]:
        logging.getLogger(__name__).warning("%s", warning)
    options.out.mkdir(parents=True, exist_ok=True)
    write_sealed(options.out / "pointing.json", result)
    draw_pointing(result, options.out / "pointing")
    draw_examples([_example(vlm, result, kind) for kind in settings.kinds], options.out / "examples.png")
    print(json.dumps(result, allow_nan=False) if options.json else summary(result))


def _example(vlm: VLM, result: Mapping[str, Any], kind: str) -> Example:
    """The first question of a kind with its maps in the layer that was chosen as best for the map without sinks.

    They are those of `vlm.look`, mean over heads. Without that map, the layer is the best one of `raw`.

    Args:
        result: of `pointing_study`.
    """
    from lsg_jax.analysis.pointing import on_target, scene_target
    from lsg_jax.data.scene_targets import questions_with_target
    from lsg_jax.report.pointing import Example

    (asked,) = questions_with_target(result["split"], kind, 1, seed=result["seed"])
    question, maps = scene_target(asked), result["maps"]
    wanted = "no_sinks" if "no_sinks" in maps else maps[0]
    ranked = [row for row in result["best"] if (row["kind"], row["choice"], row["map"]) == (kind, "layer", wanted)]
    layer = ranked[0]["layer"]
    seen = vlm.look(question.picture, question.prompt, EXAMPLE_TOKENS, maps=maps)
    values = {name: seen.values(name, 0, layer) for name in maps}
    on = on_target(seen.box, question.target)
    return Example(
        kind=kind,
        picture=question.picture,
        question=" ".join([asked.question, *([" or ".join(asked.choices) + "?"] if asked.choices else [])]),
        answer=f"{_in_words(seen.answer, asked.choices)}, {'right' if seen.answer.strip() in asked.answers else 'wrong'}",
        layer=layer,
        target=question.target,
        maps={name: seen.on_picture(of_tokens) for name, of_tokens in values.items()},
        peaks={name: tuple(seen.box[of_tokens.argmax()].tolist()) for name, of_tokens in values.items()},  # type: ignore[misc]
        hits={name: bool(on[of_tokens.argmax()] and of_tokens.max() > 0) for name, of_tokens in values.items()},
    )


def _in_words(answer: str, choices: Sequence[str]) -> str:
    """The text of a choice instead of its letter."""
    letter = string.ascii_uppercase.find(answer.strip() or "?")
    return choices[letter] if 0 <= letter < len(choices) else answer.strip()


def summary(result: dict[str, Any]) -> str:
    """A line for each kind and map: chance, and the hit rate in percent in its best layer, chosen on another split."""
    lines = [
        f"{'kind':<17}{'map':<10}{'layer':>5}{'chance':>8}{'hit':>7}{'[95 %]':>15}{'change [95 %]':>24}{'p':>9}",
    ]
    for row in result["best"]:
        if row["choice"] != "layer":
            continue
        chance, hit, low, high = (
            100 * x for x in (result["kinds"][row["kind"]]["chance"], row["hit"], row["low"], row["high"])
        )
        line = f"{row['kind']:<17}{row['map']:<10}{row['layer']:5}{chance:8.1f}{hit:7.1f}{f'[{low:.1f}, {high:.1f}]':>15}"
        if row["change"] is not None:
            change = [100 * row[name] for name in ("change", "change_low", "change_high")]
            line += f"{'{:+.1f} [{:+.1f}, {:+.1f}]'.format(*change):>24}{row['p_value']:9.2g}"
        lines.append(line)
    lines.append(
        f"best layer of the mean over heads, chosen on {result['chosen_on']}; change: against raw in its own best layer"
    )
    return "\n".join(lines)


def _plant(options: argparse.Namespace) -> None:
    from converters.plant_sinks import PlantSettings, plant

    names = ("strength", "mark", "text", "scenes", "seed")
    settings = PlantSettings(tuple(options.layers), **{name: getattr(options, name) for name in names})
    with progress_bar("plant") as progress:
        record = plant(options.model, options.out_model, settings, progress=progress)
    print(f"{'layer':>5}{'V-sinks':>16}{'ordinary, rms':>15}{'text, rms':>11}")
    for row in record["keys"]:
        sinks = f"{row['v_sink']['mean']:.2f} +- {row['v_sink']['std']:.2f}"
        print(f"{row['layer']:5}{sinks:>16}{row['ordinary']['rms']:15.2f}{row['text']['rms']:11.2f}")
    print("what each token gets of the planted key, 1 for the mean V-sink, in scenes that it was not made from")
    print(options.out_model)
