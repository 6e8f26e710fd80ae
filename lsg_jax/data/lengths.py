"""Lengths that training batches are padded to, and which examples make a batch. Pure numpy: the same on every process.

A program is compiled for each length, so there are few: those that leave the least padding (`choose_lengths`). A batch holds
examples of one bucket, which are padded to the same length (`arrange`).
"""

from __future__ import annotations

import numpy as np

UNIT = 64
"""Finer than the 128 of a TPU's attention kernel, which pads for itself: all other work of a layer follows the length."""

ENOUGH = 0.05
"""Share of padding that no further length is compiled for."""

GAIN = 0.01
"""By how much the share must fall for further lengths, where it stays above `ENOUGH`."""


def unit_of(max_length: int) -> int:
    """What lengths are multiples of: UNIT, and less where sequences are so short that few lengths would be left."""
    return UNIT if max_length >= 8 * UNIT else 16


def choose_lengths(lengths: np.ndarray, *, max_length: int, most: int, unit: int) -> tuple[int, ...]:
    """The lengths to pad examples to, ascending; every example fits into the last.

    Of all choices of so many lengths it is one with the least padding. It has the fewest lengths whose share of padding is at
    most ENOUGH, or at most GAIN above the share that `most` lengths leave.

    Args:
        lengths: int [n], tokens of each example, at least one and at most `max_length`.
        most: number of lengths.
        unit: lengths are multiples of it, or `max_length` itself.
    """
    tokens = int(np.sum(lengths, dtype=np.int64))
    rounded = np.minimum(-(-np.asarray(lengths) // unit) * unit, max_length)
    sizes, counts = np.unique(rounded, return_counts=True)
    choices = _least_padding(sizes, counts, min(most, len(sizes)))
    shares = [1 - tokens / positions for positions, _ in choices]
    bound = max(ENOUGH, shares[-1] + GAIN)
    return next(chosen for share, (_, chosen) in zip(shares, choices, strict=True) if share <= bound)


def _least_padding(sizes: np.ndarray, counts: np.ndarray, most: int) -> list[tuple[int, tuple[int, ...]]]:
    """For 1, 2, ... `most` lengths the fewest positions that hold all examples, and the lengths, by dynamic programming.

    Args:
        sizes: ascending, what examples are rounded up to. counts: examples of each.
    """
    up_to = np.concatenate([[0], np.cumsum(counts)])  # examples of the first i sizes
    best = sizes * up_to[1:]  # positions of the first i + 1 sizes, the last of them being the last length
    before: list[np.ndarray] = []  # for each further length, the size that is the length before
    found: list[tuple[int, tuple[int, ...]]] = [(int(best[-1]), (int(sizes[-1]),))]
    for count in range(2, most + 1):
        less = count - 2  # at least so many sizes come before the length before
        after, of = np.full(len(sizes), np.iinfo(np.int64).max), np.zeros(len(sizes), np.int64)
        for last in range(count - 1, len(sizes)):
            each = best[less:last] + sizes[last] * (up_to[last + 1] - up_to[less + 1 : last + 1])
            of[last] = less + int(np.argmin(each))
            after[last] = each.min()
        best = after
        before.append(of)
        place, chosen = len(sizes) - 1, [len(sizes) - 1]
        for of in reversed(before):
            place = int(of[place])
            chosen.append(place)
        found.append((int(best[-1]), tuple(sizes[chosen[::-1]].tolist())))
    return found


def arrange(order: np.ndarray, buckets: np.ndarray, batch_size: int, *, ends: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Fills batches from a stream of examples: each goes to its bucket, and a full bucket is the next batch.

        order    3 0 4 1 2 5       buckets of examples 0..5: 0 1 0 1 0 0, batches of 2
        batches  0 4 | 3 1 | 2 5

    What the buckets hold at the end is combined, the longest first, into batches of the larger bucket, so that fewer than
    `batch_size` examples are left over.

    Args:
        order: int [n], examples in the order of the stream; an example may come again, as in the next epoch.
        buckets: int [examples], the bucket of each; a larger number is a larger length.
        ends: whether the stream ends. If not, what does not fill a bucket is kept for later: the batches are the first ones of
            any longer stream.

    Returns:
        Examples int32 [batches, batch_size] and the bucket of each batch int32 [batches].
    """
    of = buckets[order]
    full, left = [], []
    for bucket in range(int(of.max(initial=-1)) + 1):
        places = np.flatnonzero(of == bucket)
        count = len(places) // batch_size * batch_size
        full.append(places[:count].reshape(-1, batch_size))
        left.append(places[count:])
    batches = np.concatenate(full) if full else np.zeros((0, batch_size), np.int64)
    batches = batches[np.argsort(batches[:, -1])]
    if ends and left:
        rest = np.concatenate(left[::-1])
        batches = np.concatenate([batches, rest[: len(rest) // batch_size * batch_size].reshape(-1, batch_size)])
    return order[batches].astype(np.int32), of[batches].max(axis=1, initial=0).astype(np.int32)
