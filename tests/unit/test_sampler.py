"""Batches: a pure function of the seed and their number."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.sampler import Pool, Sampler
from training.errors import DataError


def pool(buckets, repeats=0, **gates):
    buckets = np.asarray(buckets)
    return Pool(buckets, np.full(len(buckets), repeats), **gates)


def drawn(sampler, numbers):
    return [(draw.part, draw.rows.tolist()) for draw in map(sampler.batch, numbers)]


pools = st.lists(
    st.builds(
        pool,
        st.lists(st.integers(0, 3), min_size=1, max_size=12),
        st.integers(0, 2),
        probability=st.floats(0.1, 5),
        start_epoch=st.integers(1, 3),
        end_epoch=st.sampled_from([0, 4, 5]),
        start_step=st.integers(0, 30),
        end_step=st.sampled_from([0, 40, 77]),
    ),
    max_size=2,
).map(lambda some: [pool([0, 0, 1], 1), *some])


@settings(deadline=None, max_examples=60)
@given(pools, st.integers(1, 4), st.integers(0, 2**40))
def test_any_batch_can_be_asked_for_at_any_time(some, batch_size, seed):
    ordered = drawn(Sampler(some, batch_size, seed), range(120))
    sampler = Sampler(some, batch_size, seed)
    numbers = np.random.default_rng(0).permutation(120).tolist()
    assert drawn(sampler, numbers) == [ordered[number] for number in numbers]
    for part, rows in ordered:
        assert len(rows) == batch_size
        assert len(set(some[part].buckets[rows].tolist())) == 1
    for number, (part, _) in enumerate(ordered):
        assert some[part].is_open(Sampler(some, batch_size, seed).epoch(number), number)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_global_batches_are_the_same_for_any_number_of_processes(processes):
    whole = drawn(Sampler([pool([0, 1] * 9), pool([2] * 5)], 2, 42), range(48))
    ranks = [Sampler([pool([0, 1] * 9), pool([2] * 5)], 2, 42) for _ in range(processes)]
    accumulation = 4 // processes
    for step in range(12):
        taken = [
            draw
            for turn in range(accumulation)
            for rank, sampler in enumerate(ranks)
            for draw in drawn(sampler, [step * 4 + turn * processes + rank])
        ]
        assert taken == whole[step * 4 : step * 4 + 4]


def test_a_batch_of_four_is_two_of_two_where_there_is_one_bucket():
    some = [pool([0] * 12, 1), pool([3] * 8, start_epoch=9)]
    twos = [rows for _, rows in drawn(Sampler(some, 2, 7), range(24))]
    fours = [rows for _, rows in drawn(Sampler(some, 4, 7), range(12))]
    assert fours == [first + second for first, second in zip(twos[::2], twos[1::2], strict=True)]


def test_the_buckets_of_a_dataset_take_turns_at_random():
    sampler = Sampler([pool([0] * 40 + [1] * 40)], 2, 7)
    turns = [rows[0] >= 40 for _, rows in drawn(sampler, range(40))]
    assert sum(turns) == 20
    assert 10 < sum(a != b for a, b in pairwise(turns)) < 30  # neither in a row nor one by one


def test_an_epoch_sees_each_sample_as_often_as_asked_and_fills_short_batches_from_their_own_bucket():
    sampler = Sampler([pool([0] * 5 + [1] * 3, repeats=1)], 4, 7)
    assert sampler.steps_per_epoch == 3 + 2
    for epoch in range(3):
        counts = Counter(row for _, rows in drawn(sampler, range(epoch * 5, epoch * 5 + 5)) for row in rows)
        assert set(counts) == set(range(8))
        assert min(counts.values()) >= 2
        assert sum(counts.values()) == 20
    assert drawn(sampler, range(5)) != drawn(sampler, range(5, 10))
    assert drawn(Sampler([pool([0] * 5 + [1] * 3, repeats=1)], 4, 8), range(5)) != drawn(sampler, range(5))


def test_a_dataset_of_ten_times_the_weight_is_drawn_ten_times_as_often_until_it_is_used_up():
    some = [pool([0] * 4000, probability=10.0), pool([0] * 4000, probability=1.0)]
    first = Counter(part for part, _ in drawn(Sampler(some, 1, 3), range(2000)))
    assert first[0] / first[1] == pytest.approx(10, rel=0.15)
    all_of_it = Counter(part for part, _ in drawn(Sampler(some, 1, 3), range(8000)))
    assert all_of_it == {0: 4000, 1: 4000}


def test_sizes_weigh_unless_uniform():
    some = [pool([0] * 9000), pool([0] * 1000)]
    auto = Counter(part for part, _ in drawn(Sampler(some, 1, 3), range(900)))
    uniform = Counter(part for part, _ in drawn(Sampler(some, 1, 3, "uniform"), range(900)))
    assert auto[0] / auto[1] == pytest.approx(9, rel=0.3)
    assert uniform[0] / uniform[1] == pytest.approx(1, rel=0.2)


def test_datasets_open_and_close():
    some = [pool([0] * 10), pool([0] * 10, start_step=25, end_step=60), pool([0] * 5, start_epoch=2, end_epoch=2)]
    sampler = Sampler(some, 1, 5)
    parts = [part for part, _ in drawn(sampler, range(200))]
    assert 1 not in parts[:25]
    assert 1 in parts[25:60]
    assert 1 not in parts[60:]
    assert {sampler.epoch(number) for number, part in enumerate(parts) if part == 2} == {2}
    with pytest.raises(DataError, match=r"No dataset is drawn from at step 30.*start_step"):
        Sampler([pool([0] * 10, end_step=30)], 1, 0).batch(30)


def test_short_buckets_are_pruned_or_filled():
    assert Sampler([pool([0] * 8 + [1] * 3)], 4, 0).steps_per_epoch == 3
    pruned = Sampler([pool([0] * 8 + [1] * 3)], 4, 0, prune=True)
    assert (pruned.steps_per_epoch, pruned.pruned) == (2, 3)
    assert Sampler([pool([1] * 3, repeats=1)], 4, 0, prune=True).pruned == 0
    with pytest.raises(DataError, match="every bucket has fewer than 4 pictures"):
        Sampler([pool([1] * 3)], 4, 0, prune=True)
    with pytest.raises(DataError, match="the dataset is empty"):
        Sampler([], 4, 0)
