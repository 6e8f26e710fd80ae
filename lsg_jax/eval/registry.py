"""The benchmarks by name."""

from __future__ import annotations

import re

from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark
from lsg_jax.eval.benchmarks.ai2d import AI2D
from lsg_jax.eval.benchmarks.amber import AMBER
from lsg_jax.eval.benchmarks.chair import CHAIR
from lsg_jax.eval.benchmarks.chartqa import CHARTQA
from lsg_jax.eval.benchmarks.cv_bench import CV_BENCH
from lsg_jax.eval.benchmarks.gqa import GQA
from lsg_jax.eval.benchmarks.hallusionbench import HALLUSIONBENCH
from lsg_jax.eval.benchmarks.mathvista import MATHVISTA
from lsg_jax.eval.benchmarks.mmbench import MMBENCH
from lsg_jax.eval.benchmarks.mme import MME
from lsg_jax.eval.benchmarks.mmmu import MMMU
from lsg_jax.eval.benchmarks.mmstar import MMSTAR
from lsg_jax.eval.benchmarks.mmvp import MMVP
from lsg_jax.eval.benchmarks.ocrbench import OCRBENCH
from lsg_jax.eval.benchmarks.pope import POPE
from lsg_jax.eval.benchmarks.questions import QUESTIONS
from lsg_jax.eval.benchmarks.realworldqa import REALWORLDQA
from lsg_jax.eval.benchmarks.scenes import SCENES
from lsg_jax.eval.benchmarks.scienceqa_img import SCIENCEQA_IMG
from lsg_jax.eval.benchmarks.seed_img import SEED_IMG
from lsg_jax.eval.benchmarks.textvqa import TEXTVQA
from lsg_jax.eval.benchmarks.vizwiz import VIZWIZ
from lsg_jax.eval.benchmarks.vstar import VSTAR

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        MMSTAR, CV_BENCH, POPE, SCIENCEQA_IMG, AI2D, SEED_IMG, REALWORLDQA, MME, GQA, TEXTVQA, CHARTQA, OCRBENCH, SCENES,
        MMVP, HALLUSIONBENCH, CHAIR, AMBER,
        MMBENCH, MMMU, VIZWIZ, MATHVISTA, VSTAR,
    )
}  # fmt: skip

NAME = re.compile(r"\w[\w .+-]{0,99}")
"""Names of own questions: they become part of files' names, so they hold no separator and do not begin with a dot."""


def find_benchmark(name: str, path: str) -> Benchmark:
    """The benchmark of that name; `QUESTIONS` for a `.jsonl` file of own questions under any other name.

    Raises:
        InputError: the name is unknown or cannot be part of a file's name, or the path is missing.
    """
    if name in BENCHMARKS:
        if not path and name != SCENES.name:
            raise InputError(f"benchmark {name}: give its file, folder or glob as {name}=PATH")
        return BENCHMARKS[name]
    if not NAME.fullmatch(name):
        raise InputError(
            f"benchmark {name[:80]!r}: results are written under this name; give questions as NAME=FILE.jsonl, with a NAME of "
            "at most 100 letters, digits, spaces and _ . + -, that begins with a letter or digit"
        )
    if path.endswith(".jsonl"):
        return QUESTIONS
    raise InputError(f"benchmark {name}: unknown; known are {', '.join(BENCHMARKS)}, and own questions as NAME=FILE.jsonl")
