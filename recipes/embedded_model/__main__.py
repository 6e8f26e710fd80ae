"""Command line of the recipe: `python -m recipes.embedded_model OUT`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from recipes.embedded_model.make import RECIPE, make
from recipes.embedded_model.tower import TowerRecipe


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.embedded_model", description="Makes the embedded model, a small LLaVA, from nothing."
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--scenes", type=int, default=RECIPE.scenes, help="scenes that the vision tower is trained on")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="training steps of the vision tower")
    parser.add_argument("--conversations", type=int, default=16_000, help="at most, in each lesson of the language model")
    parser.add_argument("--from", type=Path, metavar="CHECKPOINT", dest="given", help="take its vision tower and tokenizer")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="as in `lsg train`")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    for name in ("recipes", "lsg_jax"):
        logging.getLogger(name).setLevel(logging.INFO)
    recipe = TowerRecipe(scenes=options.scenes, steps=options.steps)
    print(make(options.out, recipe, given=options.given, conversations=options.conversations, overrides=options.set))


if __name__ == "__main__":
    main()
