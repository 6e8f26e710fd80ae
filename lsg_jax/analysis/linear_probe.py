"""Linear probes: how well the attributes of an image can be read linearly from hidden states (paper.md, study 1).

The probe is linear discriminant analysis with shrinkage: each class is a Gaussian around its own mean, and all share the
covariance (1 - s) * within-class + s * identity on standardised features (Friedman 1989). The solution is in closed form,
without learning rate or convergence, and one Cholesky factor serves the labels of all attributes. (Least squares on class
indicators has a closed form, too, but if a count lies along one direction, its outer classes mask those between.) The shrinkage
is chosen on images that are neither used to fit nor held out.

Shape letters besides those of `lsg_jax.types`: N images, J labels of an attribute (1 for `count`, one for each of `colours`), K
classes of each label, R draws, Q probes, F images used to fit, V kinds of features.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve

from lsg_jax.types import Array

SHRINKAGES = (0.99, 0.9, 0.5, 0.1, 0.01, 0.001)
"""Strengths that are tried; of equally good ones the first is chosen."""

CHOOSING_PART = 5
"""One in so many training images is not used to fit but to choose the shrinkage."""

MIN_TRAIN, MIN_TEST = 20, 5
"""With fewer images no probe is fitted."""

METRICS = ("accuracy", "f1")


@dataclass(frozen=True)
class Attribute:
    """An attribute of images. With `several`, any number of its labels may hold at once, and each is predicted as yes or no."""

    name: str
    vocabulary: tuple[Any, ...]
    several: bool

    @property
    def classes(self) -> int:
        return 2 if self.several else len(self.vocabulary)

    def encode(self, images: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """int32 [N, J]: one index into the vocabulary, or, with `several`, 0 or 1 for each of its labels."""
        values = [image[self.name] for image in images]
        if self.several:
            return np.array([[label in value for label in self.vocabulary] for value in values], np.int32)
        return np.array([[self.vocabulary.index(value)] for value in values], np.int32)


@dataclass(frozen=True)
class Splits:
    """Training and held-out images, the same for every layer and token group.

    Attributes:
        train, test: int [N] each.
        fit, choose: int [R, ...], the two parts of `train` in each draw, to fit and to choose the shrinkage.
    """

    train: np.ndarray
    test: np.ndarray
    fit: np.ndarray
    choose: np.ndarray


def make_splits(train: int, test: int, draws: int, *, seed: int) -> Splits:
    """Images 0 to train - 1 are for training, the next `test` are held out; each draw splits the training images again."""
    orders = np.stack([np.random.default_rng([seed, draw]).permutation(train) for draw in range(draws)])
    choosing = -(-train // CHOOSING_PART)
    return Splits(np.arange(train), np.arange(train, train + test), orders[:, choosing:], orders[:, :choosing])


@flax.struct.dataclass
class Probes:
    """Probes that are fitted in one call.

    Attributes:
        column: int32 [Q], which of the V kinds of features.
        present: bool [Q, N], the images that have this feature.
        fit, choose: int32 [Q, ...], rows of Splits.
    """

    column: Array
    present: Array
    fit: Array
    choose: Array


@functools.partial(jax.jit, static_argnames="classes")
def predict(features: jax.Array, labels: jax.Array, probes: Probes, *, classes: int) -> jax.Array:
    """Fits every probe to every label, and predicts the labels of all images.

    Args:
        features: float32 [N, V, D].
        labels: int32 [N, J], each below `classes`; a class without an image to fit is never predicted.

    Returns:
        int32 [Q, N, J].
    """
    with jax.default_matmul_precision("highest"):  # a TPU would round float32 to bfloat16
        return jax.lax.map(lambda probe: _predict_one(features[:, probe.column], labels, probe, classes), probes)


def _predict_one(x: jax.Array, labels: jax.Array, probe: Probes, classes: int) -> jax.Array:
    fits, chooses = (probe.present[rows].astype(x.dtype) for rows in (probe.fit, probe.choose))
    count = jnp.maximum(fits.sum(), 1)
    x = _standardise(x, probe.fit, fits / count)
    fitted = x[probe.fit] * fits[:, None]
    members_FJK = jax.nn.one_hot(labels[probe.fit], classes) * fits[:, None, None]
    sizes_JK = members_FJK.sum(0)
    # the class means of all labels are the columns of fitted.T @ averaging
    averaging = (members_FJK / jnp.maximum(sizes_JK, 1)).reshape(len(fitted), -1)
    means = known = fitted.T @ averaging
    if fitted.shape[0] < fitted.shape[1]:
        # the smaller system has the same scores: its solution times fitted.T solves the other one
        gram, known, means, x = fitted @ fitted.T, averaging, fitted @ means, x @ fitted.T
    else:
        gram = fitted.T @ fitted

    def at(shrinkage: jax.Array) -> jax.Array:
        ridge = shrinkage / (1 - shrinkage)
        solved = cho_solve(cho_factor(gram / count + ridge * jnp.eye(len(gram))), known)
        by_label = lambda a: a.reshape(-1, *sizes_JK.shape)
        cross_JKK = jnp.einsum("DJK,DJM->JKM", by_label(means), by_label(solved))
        scores = jax.vmap(_discriminants, in_axes=(1, 0, 0, None), out_axes=1)(
            by_label(x @ solved), cross_JKK, sizes_JK / count, 1 + ridge
        )
        return scores.argmax(-1).astype(jnp.int32)

    predicted_SNJ = jax.lax.map(at, jnp.array(SHRINKAGES))
    right_SJ = jnp.einsum("SCJ,C->SJ", predicted_SNJ[:, probe.choose] == labels[probe.choose], chooses)
    return jnp.take_along_axis(predicted_SNJ, right_SJ.argmax(0)[None, None], axis=0)[0]


def _standardise(x: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean 0 and variance 1 over `rows`; a feature that is constant over them becomes 0."""
    x = x - weights @ x[rows]
    variance = weights @ jnp.square(x[rows])
    return x * jnp.where(variance > 0, jax.lax.rsqrt(jnp.maximum(variance, 1e-30)), 0)


def _discriminants(projected: jax.Array, cross: jax.Array, priors: jax.Array, scale: jax.Array) -> jax.Array:
    """Discriminants of the classes of one label, float32 [N, K]; the largest one is predicted.

    Let T be the total covariance, W the one within classes, M the class means minus the overall mean, and P the diagonal of
    priors. Then W = T - M P M^T, so (W + r)^-1 M = (T + r)^-1 M (1 - P M^T (T + r)^-1 M)^-1, and one factor of T + r serves all
    labels.

    Args:
        projected: x (T + r)^-1 M [N, K].
        cross: M^T (T + r)^-1 M [K, K].
        priors: [K], the share of each class.
        scale: 1 + r.
    """
    inverse = jnp.linalg.inv(jnp.eye(len(priors)) - priors[:, None] * cross)
    return scale * (projected @ inverse - jnp.diag(cross @ inverse) / 2) + jnp.log(priors)


def score(
    attribute: Attribute, label: np.ndarray, predicted: np.ndarray, splits: Splits, present: np.ndarray
) -> list[dict[str, Any]]:
    """A row for each of METRICS: held-out `mean` and `std` (n - 1) over draws, `chance`, and the numbers of images.

    Chance is the score of always predicting the most frequent class of the training images. With `several` labels, accuracy is
    the mean over labels, without labels that are constant over the training or the held-out images. F1 is the mean over the
    classes of the held-out images, or with `several` over labels.

    Args:
        label: int [N, J].
        predicted: int [R, N, J].
        present: bool [N].

    Returns:
        Rows; with too few images or only one class `mean`, `std` and `chance` are None and `reason` says why.
    """
    train, test = (rows[present[rows]] for rows in (splits.train, splits.test))
    common = {"draws": len(predicted), "train": len(train), "test": len(test)}
    reason = None
    if len(train) < MIN_TRAIN or len(test) < MIN_TEST:
        reason = (
            f"{len(train)} training and {len(test)} held-out images have such tokens; {MIN_TRAIN} and {MIN_TEST} are needed"
        )
    else:
        varied = (np.ptp(label[train], axis=0) > 0) & (np.ptp(label[test], axis=0) > 0)
        if not varied.any():
            reason = f"one class only: {attribute.name} is the same in all training or in all held-out images"
    if reason is not None:
        return [{"metric": m, "mean": None, "std": None, "chance": None, **common, "reason": reason} for m in METRICS]
    truth = label[test][:, varied]
    frequent = np.array([np.bincount(column).argmax() for column in label[train][:, varied].T])
    rows = []
    for metric, measure in zip(METRICS, (_accuracy, _several_f1 if attribute.several else _class_f1), strict=True):
        values = np.array([measure(draw[test][:, varied], truth) for draw in predicted])
        chance = measure(np.broadcast_to(frequent, truth.shape), truth)
        rows.append({"metric": metric, "mean": values.mean(), "std": values.std(ddof=1), "chance": chance, **common})
    return [{name: float(v) if isinstance(v, np.floating) else v for name, v in row.items()} for row in rows]


def _accuracy(predicted: np.ndarray, truth: np.ndarray) -> np.floating:
    return np.mean(predicted == truth)


def _class_f1(predicted: np.ndarray, truth: np.ndarray) -> np.floating:
    return np.mean([_f1(predicted == k, truth == k) for k in np.unique(truth)])


def _several_f1(predicted: np.ndarray, truth: np.ndarray) -> np.floating:
    return np.mean([_f1(p == 1, t == 1) for p, t in zip(predicted.T, truth.T, strict=True)])


def _f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    return 2 * int((predicted & truth).sum()) / int(predicted.sum() + truth.sum())
