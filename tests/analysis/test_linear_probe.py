"""Linear probes: against the textbook formula, on planted and shuffled signals, and their scores against numbers by hand."""

import json

import numpy as np
import pytest

from lsg_jax.analysis.linear_probe import SHRINKAGES, Attribute, Probes, make_splits, predict, score

TRAIN, TEST, DRAWS, CLASSES = 250, 200, 2, 5
IMAGES = TRAIN + TEST
SPLITS = make_splits(TRAIN, TEST, DRAWS, seed=0)
COUNT = Attribute("count", (1, 2, 3, 4, 5), several=False)
COLOURS = Attribute("colours", ("red", "green", "blue"), several=True)


def fit(x, labels, present=None):
    """Predictions int [R, N, J] of one kind of features [N, D], for labels [N, J]."""
    present = np.ones((DRAWS, len(x)), bool) if present is None else np.tile(present, (DRAWS, 1))
    probes = Probes(column=np.zeros(DRAWS, int), present=present, fit=SPLITS.fit, choose=SPLITS.choose)
    return np.asarray(predict(x[:, None].astype(np.float32), labels.astype(np.int32), probes, classes=CLASSES))


def by_the_book(x, label, rows, choose):
    """float64 scores [N, K] of linear discriminant analysis, one class after another, with the shrinkage that chooses best."""
    x = (x - x[rows].mean(0)) / x[rows].std(0)
    classes = np.unique(label[rows])
    means = np.array([x[rows][label[rows] == k].mean(0) for k in classes])
    within = sum((label[rows] == k).mean() * np.cov(x[rows][label[rows] == k].T, bias=True) for k in classes)
    best = None
    for shrinkage in SHRINKAGES:
        weights = np.linalg.solve((1 - shrinkage) * within + shrinkage * np.eye(x.shape[1]), means.T)
        priors = np.log([(label[rows] == k).mean() for k in classes])
        scores = np.full((len(x), CLASSES), -np.inf)
        scores[:, classes] = x @ weights - np.einsum("KD,DK->K", means, weights) / 2 + priors
        right = (scores[choose].argmax(1) == label[choose]).mean()
        if best is None or right > best[0]:
            best = right, scores
    return best[1]


@pytest.mark.parametrize("width", [29, 229], ids=["fewer dimensions than images", "more"])
def test_equals_the_textbook(width):
    """Correlated features of unequal size, one of them constant; classes that overlap, are unequal, or are missing."""
    rng = np.random.default_rng(0)
    labels = np.stack([rng.choice(5, IMAGES, p=[0.4, 0.3, 0.2, 0.1, 0.0]), rng.integers(0, 2, IMAGES)], axis=1)
    x = rng.normal(size=(IMAGES, width)) @ rng.normal(size=(width, width)) + 4 * rng.normal(size=(5, width))[labels[:, 0]]
    x = 10 ** rng.uniform(-2, 3, width) * (x + 3 * labels[:, 1:] * rng.normal(size=width) + 5)
    present = rng.random(IMAGES) < 0.9
    found = fit(np.concatenate([x, np.full((IMAGES, 1), 7.0)], axis=1), labels, present)
    for draw in range(DRAWS):
        rows, choose = (own[draw][present[own[draw]]] for own in (SPLITS.fit, SPLITS.choose))
        for j in (0, 1):
            scores = by_the_book(x, labels[:, j], rows, choose)
            first, second = np.sort(scores, axis=1)[:, ::-1][:, :2].T
            clear = first - second > 1e-3 * np.abs(scores[np.isfinite(scores)]).max()  # rounding decides near ties
            assert clear.mean() > 0.9
            np.testing.assert_array_equal(found[draw, clear, j], scores[clear].argmax(1))


def planted(rng):
    """Features 30 wide: the count lies along one direction and colours along others, under noise that is small there."""
    labels = np.concatenate([rng.integers(0, 5, (IMAGES, 1)), rng.integers(0, 2, (IMAGES, 3))], axis=1)
    directions = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    noise = rng.normal(size=(IMAGES, 30)) * np.where(np.arange(30) < 4, 0.1, 3.0)
    noise[:, :4] += labels
    return noise @ directions.T, labels


def rows_of(labels, found):
    everywhere = np.ones(IMAGES, bool)
    count, colours = (COUNT, slice(0, 1)), (COLOURS, slice(1, 4))
    return [score(own, labels[:, part], found[..., part], SPLITS, everywhere) for own, part in (count, colours)]


def test_recovers_a_planted_signal_and_finds_none_in_shuffled_labels():
    rng = np.random.default_rng(1)
    x, labels = planted(rng)
    for accuracy, f1 in rows_of(labels, fit(x, labels)):
        assert accuracy["mean"] > 0.99 and f1["mean"] > 0.99 and accuracy["std"] < 0.01
        assert (accuracy["train"], accuracy["test"], accuracy["draws"]) == (TRAIN, TEST, DRAWS)
    # least squares on class indicators sees the same line of counts, but hardly ever names those in between
    indicators = np.eye(5)[labels[:TRAIN, 0]]
    design = np.column_stack([x, np.ones(IMAGES)])
    masked = (design @ np.linalg.lstsq(design[:TRAIN], indicators, rcond=None)[0]).argmax(1)
    assert np.mean(masked[TRAIN:] == labels[TRAIN:, 0]) < 0.8

    shuffled = rng.permutation(labels)
    for (accuracy, _), share, trials in zip(rows_of(shuffled, fit(x, shuffled)), (1 / 5, 1 / 2), (TEST, 3 * TEST), strict=True):
        assert abs(accuracy["mean"] - share) < 4 * (share * (1 - share) / trials) ** 0.5
        assert abs(accuracy["chance"] - share) < 4 * (share * (1 - share) / trials) ** 0.5


def test_nothing_to_fit_is_no_nan():
    x, labels = planted(np.random.default_rng(2))
    for there in (np.zeros(IMAGES, bool), np.arange(IMAGES) == SPLITS.fit[0, 0], np.arange(IMAGES) >= TRAIN):
        found = fit(x, labels, there)
        for attribute, part in ((COUNT, slice(0, 1)), (COLOURS, slice(1, 4))):
            for row in score(attribute, labels[:, part], found[..., part], SPLITS, there):
                assert row["mean"] is row["std"] is row["chance"] is None and "images have such tokens" in row["reason"]
    constant = fit(np.ones((IMAGES, 30)), labels)
    assert len(np.unique(constant[0, :, 0])) == 1  # the most frequent class


def test_scores_by_hand():
    label = np.concatenate([np.arange(TRAIN) % 2 * 3, [0, 0, 0, 0, 0, 0, 1, 1, 3, 3], np.zeros(TEST - 10, int)])[:, None]
    there = np.arange(IMAGES) < TRAIN + 10
    found = np.stack([label, label]).copy()
    found[0, TRAIN : TRAIN + 10, 0] = [0, 0, 0, 0, 0, 3, 3, 3, 3, 0]  # 6 of 10
    accuracy, f1 = score(COUNT, label, found, SPLITS, there)
    numbers = {"mean": 0.8, "std": pytest.approx(0.4 / 2**0.5), "chance": 0.6, "draws": 2, "train": TRAIN, "test": 10}
    assert accuracy == {"metric": "accuracy", **numbers}
    # class 0: 5 right of 6 named and 6 there; class 1: never named; class 3: 1 right of 4 named and 2 there
    assert f1["mean"] == pytest.approx(((10 / 12 + 0 + 2 / 6) / 3 + 1) / 2)
    assert f1["chance"] == pytest.approx(2 * 6 / 16 / 3)  # names 0 always

    several = np.zeros((IMAGES, 3), int)
    several[2::4, 0], several[:, 1], several[: TRAIN + 100, 2] = 1, 1, 1  # the second is always there
    found = np.stack([several, 1 - several])
    accuracy, f1 = score(COLOURS, several, found, SPLITS, np.ones(IMAGES, bool))
    assert accuracy["mean"] == 0.5 and f1["mean"] == 0.5 and accuracy["chance"] == 0.75 and f1["chance"] == 0.0
    reason = "one class only"
    (refused, _) = score(COLOURS, np.tile(several[:, 1:2], 3), np.zeros((2, IMAGES, 3), int), SPLITS, np.ones(IMAGES, bool))
    assert refused["mean"] is None and reason in refused["reason"]
    assert reason in score(COUNT, several[:, 1:2], found[..., :1], SPLITS, np.ones(IMAGES, bool))[1]["reason"]
    json.dumps([accuracy, f1, refused], allow_nan=False)


def test_labels_and_splits():
    images = [{"count": 2, "colours": ("blue", "red")}, {"count": 5, "colours": ()}]
    assert COUNT.encode(images).tolist() == [[1], [4]] and COUNT.classes == 5
    assert COLOURS.encode(images).tolist() == [[1, 0, 1], [0, 0, 0]] and COLOURS.classes == 2
    for own in zip(SPLITS.fit, SPLITS.choose, strict=True):
        assert sorted(np.concatenate(own)) == list(range(TRAIN)) and len(own[1]) == TRAIN // 5
    assert (SPLITS.fit[0] != SPLITS.fit[1]).any() and SPLITS.test.tolist() == list(range(TRAIN, TRAIN + TEST))
