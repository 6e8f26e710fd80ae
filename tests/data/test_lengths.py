"""The lengths of training batches against every choice there is, and batches as a simulation of buckets fills them."""

from itertools import combinations

import numpy as np
import pytest

from lsg_jax.data.lengths import ENOUGH, GAIN, _least_padding, arrange, choose_lengths, unit_of


def positions(lengths, chosen):
    return sum(min(size for size in chosen if size >= length) for length in lengths)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_lengths_has_less_padding(seed):
    rng = np.random.default_rng(seed)
    max_length, unit = int(rng.integers(60, 140)), int(rng.integers(5, 20))
    lengths = rng.integers(1, max_length + 1, rng.integers(1, 60))
    rounded = np.minimum(-(-lengths // unit) * unit, max_length)
    sizes, counts = np.unique(rounded, return_counts=True)
    most = min(4, len(sizes))
    found = _least_padding(sizes, counts, most)
    for count, (least, chosen) in enumerate(found, 1):
        every = [(*more, sizes[-1]) for more in combinations(sizes[:-1].tolist(), count - 1)]
        assert least == positions(lengths, chosen) == min(positions(lengths, choice) for choice in every)
        assert len(chosen) == count and list(chosen) == sorted(set(chosen))
    taken = choose_lengths(lengths, max_length=max_length, most=most, unit=unit)
    shares = [1 - lengths.sum() / least for least, _ in found]
    assert taken == next(
        choice for share, (_, choice) in zip(shares, found, strict=True) if share <= max(ENOUGH, shares[-1] + GAIN)
    )
    assert all(size % unit == 0 or size == max_length for size in taken) and lengths.max() <= taken[-1] <= max_length


def test_few_lengths_are_compiled():
    of = lambda lengths, **more: choose_lengths(np.array(lengths), **{"max_length": 1024, "most": 8, "unit": 128} | more)
    assert of([1000] * 9) == (1024,) and of([500] * 9) == (512,)  # one is enough
    assert of([100] * 50 + [1000] * 50) == (128, 1024)
    assert of([100] * 50 + [1000] * 50, most=1) == (1024,)
    assert of([100] * 5 + [950] * 50, max_length=1000) == (128, 1000)  # no multiple, but no longer than asked for
    assert [unit_of(length) for length in (64, 511, 512, 9216)] == [16, 16, 64, 64]


def simulated(order, buckets, size, ends):
    """The batches one example at a time."""
    held, batches = [[] for _ in range(max(buckets) + 1)], []
    for example in order:
        held[buckets[example]].append(example)
        if len(held[buckets[example]]) == size:
            batches.append(held[buckets[example]])
            held[buckets[example]] = []
    rest = [example for bucket in reversed(held) for example in bucket] if ends else []
    batches += [rest[i : i + size] for i in range(0, len(rest) - size + 1, size)]
    return batches


@pytest.mark.parametrize("seed", range(30))
def test_batches_are_full_buckets_and_every_example_is_trained_on_once_an_epoch(seed):
    rng = np.random.default_rng(seed)
    examples, size, epochs = int(rng.integers(1, 60)), int(rng.integers(1, 9)), int(rng.integers(1, 4))
    buckets = rng.integers(0, rng.integers(1, 5), examples)
    order = np.concatenate([rng.permutation(examples) for _ in range(epochs)])
    table, of = arrange(order, buckets, size)
    assert table.dtype == of.dtype == np.int32 and table.shape == (len(order) // size, size)
    assert table.tolist() == simulated(order.tolist(), buckets.tolist(), size, True)
    assert of.tolist() == [max(buckets[batch]) for batch in table.tolist()]
    times = np.bincount(table.ravel(), minlength=examples)
    assert times.max(initial=0) <= epochs and epochs * examples - times.sum() < size
    if len(set(buckets.tolist())) == 1:  # the order of the stream
        np.testing.assert_array_equal(table.ravel(), order[: table.size])
    for cut in range(0, len(order), 7):  # the start of a stream gives the first batches
        first, first_of = arrange(order[:cut], buckets, size, ends=False)
        np.testing.assert_array_equal(first, table[: len(first)])
        np.testing.assert_array_equal(first_of, of[: len(first)])
        assert len(first) * size >= cut - (max(buckets) + 1) * (size - 1)
