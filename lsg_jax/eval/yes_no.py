"""Precision, recall and F1 of yes/no questions, of which one answer is the class that is looked for."""

from __future__ import annotations

import numpy as np

from lsg_jax.eval.benchmark import Graded, Metrics, mean


def share(weight: np.ndarray, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Percent of `whole` that is in `part`, both bool [N], under the weights [R, N]: [R].

    0 for an empty whole, as in lmms-eval, VLMEvalKit and AMBER (LLaVA's code fails); NaN if there is no item at all.
    """
    counted, total = weight @ (part & whole), weight @ whole
    empty = np.where(weight.sum(-1) > 0, 0.0, np.nan)
    return np.divide(100.0 * counted, total, out=empty, where=total > 0)


def harmonic_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[R]; 0 where both are, NaN where one is."""
    return np.divide(2.0 * a * b, a + b, out=np.where(np.isnan(a), np.nan, 0.0), where=a + b > 0)


def yes_no_scores(graded: Graded, mask: np.ndarray, positive: str) -> Metrics:
    """`accuracy`, and `precision`, `recall` and `f1` of the answer `positive`, over the items of `mask`; percent."""
    there = np.array([item.answers[0] == positive for item in graded.items], bool)
    said = np.array([parsed == positive for parsed in graded.parsed], bool)
    weight = graded.weight * mask
    precision, recall = share(weight, there, said), share(weight, said, there)
    return {"accuracy": mean(graded, mask), "precision": precision, "recall": recall, "f1": harmonic_mean(precision, recall)}
