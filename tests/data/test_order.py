import itertools
import time
import tracemalloc

import numpy as np
import pytest

from m2t_accel.config.recipes import build_config
from m2t_accel.data import order
from m2t_accel.data.order import PooledOrder, ShuffledOrder, permuted


def settings(batch_size=16, device_batch_size=4, **others):
    return build_config(
        {"recipe": "digits", "batch_size": batch_size, "device_batch_size": device_batch_size, **others}
    )


# --- the permutation


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100, 1437, 65_537])
def test_permuted_is_a_permutation(size):
    for key in ((0, 0, 0), (0, 0, 1), (5, 1, 2)):
        assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


def test_a_place_is_computed_alone():
    whole = permuted(np.arange(1000), 1000, (0, 7, 3))
    assert np.array_equal(permuted(np.array([[17, 999], [0, 500]]), 1000, (0, 7, 3)), whole[[[17, 999], [0, 500]]])


def test_permutations_are_as_random_as_numpys():
    """Each of 12 places goes to each of 12 as often, over keys; and neighbours end as far apart as by chance."""
    number, size = 6000, 12
    drawn = np.stack([permuted(np.arange(size), size, (0, seed, 0)) for seed in range(number)])
    counts = np.stack([np.bincount(drawn[:, place], minlength=size) for place in range(size)])
    chi_square = ((counts - number / size) ** 2 / (number / size)).sum()
    assert chi_square < 200  # 121 degrees of freedom: by chance more than 182 once in 5000
    large = permuted(np.arange(100_000), 1_281_167, (0, 0, 0)).astype(float)
    for lag in (1, 2, 32, 256):
        assert abs(np.corrcoef(large[:-lag], large[lag:])[0, 1]) < 0.012
    assert large.mean() == pytest.approx(1_281_167 / 2, rel=0.01)
    assert np.abs(np.diff(large)).mean() == pytest.approx(1_281_167 / 3, rel=0.01)


def permuted_again(position, size, key):
    """A second implementation, of whole numbers: a Feistel network of eight rounds, walked until it is inside."""
    keys = np.random.SeedSequence(key).generate_state(8, np.uint64).tolist()
    bits = max(2, (size - 1).bit_length())
    low, high = bits // 2, bits - bits // 2
    while True:
        left, right = position >> low, position % 2**low
        for number, round_key in enumerate(keys):
            if number % 2:
                right ^= (splitmix64(left ^ round_key) >> 32) % 2**low
            else:
                left ^= (splitmix64(right ^ round_key) >> 32) % 2**high
        position = left << low | right
        if position < size:
            return position


def splitmix64(state):
    """The output of SplitMix64 at a state (Steele, Lea and Flood, Fast splittable pseudorandom generators, 2014)."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


@pytest.mark.parametrize("size", [1, 2, 12, 1437, 1_281_167, 5 * 10**9, 2**62])
def test_a_second_implementation_permutes_alike(size):
    for key in ((0, 0, 0), (0, 2**32 - 1, 299)):
        positions = np.random.default_rng(0).integers(0, size, 50)
        expected = [permuted_again(position, size, key) for position in positions.tolist()]
        assert permuted(positions, size, key).tolist() == expected


def test_an_order_is_the_same_with_every_release():
    """Of numpy as well; a run that goes on with another would show some images twice and others not at all."""
    config = settings(seed=5)
    assert ShuffledOrder(1_281_167, config).sub_batch(3, 1000).tolist() == [794908, 1124298, 505609, 62319]
    pooled = PooledOrder(np.full(50, 10, np.int32), config)
    pool = pooled.pool(3, 2, 0)
    assert pooled.order[:8].tolist() == [10, 32, 20, 33, 21, 24, 11, 40]
    assert pool.segments[:3] == [(5, 8, 10), (8, 0, 10), (14, 0, 10)]
    assert pool.shuffle[:8].tolist() == [119, 65, 63, 78, 44, 87, 81, 30]


def test_epochs_seeds_and_sizes_have_orders_of_their_own():
    orders = {tuple(permuted(np.arange(50), 50, (0, seed, epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


# --- read one by one


def test_an_epoch_of_shuffled_samples_shows_each_once_up_to_the_dropped_last_batch():
    shuffled = ShuffledOrder(1003, settings())
    shown = np.concatenate([shuffled.sub_batch(2, index) for index in range(1003 // 16 * 4)])
    assert len(set(shown.tolist())) == len(shown) == 992


@pytest.mark.parametrize("size", [10**9, 5 * 10**9])  # the second is more than 32 bits count
def test_billions_of_samples_are_shuffled_in_no_memory(size):
    config = settings(batch_size=1024 * 32, device_batch_size=32)
    tracemalloc.start()
    shuffled, started = ShuffledOrder(size, config), time.perf_counter()
    some = np.concatenate([shuffled.sub_batch(0, index) for index in range(0, size // 32, 10**6)])
    assert time.perf_counter() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert len(np.unique(some)) == len(some) == -(-size // 32 // 10**6) * 32
    assert 0 <= some.min() < size // 50
    assert size // 50 * 49 < some.max() < size


# --- read in pools


def samples_of(pooled, epoch, device):
    """The (piece, row) pairs that a virtual device sees in an epoch, in order."""
    seen = []
    for index in range(pooled.num_pools()):
        pool = pooled.pool(epoch, device, index)
        rows = [(segment.piece, row) for segment in pool.segments for row in range(segment.first, segment.stop)]
        assert len(pool.shuffle) == len(rows)
        seen += [rows[i] for i in pool.shuffle]
    return seen


@pytest.mark.parametrize(
    "sizes",
    [[7] * 40, [1000], [1, 500, 0, 3, 90, 2], [64] * 3, list(range(60))],
    ids=["even", "one piece", "uneven", "fewer pieces than devices", "growing"],
)
@pytest.mark.parametrize("pool_size", [16, 10_000])
def test_an_epoch_of_pools_shows_each_sample_once(sizes, pool_size, monkeypatch):
    monkeypatch.setattr(order, "POOL_SIZE", pool_size)
    monkeypatch.setattr(order, "MIN_POOL_BATCHES", 2)
    config = settings()
    pooled = PooledOrder(np.array(sizes, np.int32), config)
    everything = {(piece, row) for piece, size in enumerate(sizes) for row in range(size)}
    left_out = []
    for epoch in range(2):
        shares = [samples_of(pooled, epoch, device) for device in range(4)]
        assert {len(share) for share in shares} == {sum(sizes) // 16 * 4}  # equal steps on all
        shown = [sample for share in shares for sample in share]
        assert len(set(shown)) == len(shown)
        assert set(shown) <= everything
        left_out.append(everything - set(shown))
        assert len(left_out[-1]) == sum(sizes) % 16


def test_pools_are_shuffled_and_epochs_differ():
    pooled = PooledOrder(np.full(100, 10, np.int32), settings())
    first, second = (samples_of(pooled, epoch, 0) for epoch in range(2))
    assert first != second
    assert first != sorted(first)
    assert samples_of(pooled, 0, 0) == first  # going back to an epoch
    pieces = [piece for piece, _ in first[:4]]
    assert len(set(pieces)) > 1  # a sub-batch is of several pieces


def test_every_pool_has_a_shuffle_of_its_own(monkeypatch):
    monkeypatch.setattr(order, "POOL_SIZE", 16)
    sizes = np.full(1000, 10, np.int32)
    pooled, reseeded = PooledOrder(sizes, settings()), PooledOrder(sizes, settings(seed=1))
    places = list(itertools.product((0, 1), (0, 3), (0, 1)))  # epoch, device, index
    shuffles = [part.pool(*place).shuffle.tobytes() for part in (pooled, reseeded) for place in places]
    assert len(set(shuffles)) == len(shuffles) == 16


SIZES = {  # samples: pieces, rows of each
    "ImageNet in row groups of 100": np.full(12_812, 100, np.int32),
    "a billion samples, 100 000 shards of 100 row groups": np.full(10_000_000, 100, np.int32),
    "a billion samples, 100 000 shards of one": np.full(100_000, 10_000, np.int32),
    "three billion samples, more than 32 bits count": np.full(30_000, 100_000, np.int32),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_of_one_of_1024_ranks_takes_2_seconds_and_200_megabytes(name):
    """Of 8 workers each: a plan does not know of them. Every rank's share is as long, and no two meet."""
    config = settings(batch_size=1024 * 32, device_batch_size=32)
    tracemalloc.start()
    started = time.perf_counter()
    pooled = PooledOrder(SIZES[name], config)
    pool = pooled.pool(epoch=3, device=1023, index=0)
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2
    assert peak < 200e6
    assert pooled.steps == SIZES[name].sum(dtype=np.int64) // config.batch_size
    assert len(pool.shuffle) == min(pooled.steps, 8) * 32
    # The stretches of all ranks lie end to end, and cover the sequence up to the dropped last batch.
    stretch = pooled.steps * 32
    for device in (0, 1, 511, 1023):
        first = next(pooled.segments(device * stretch, device * stretch + 1))
        place = np.flatnonzero(pooled.order == first.piece)[0]
        assert pooled.ends[place] - pooled.piece_sizes[first.piece] + first.first == device * stretch
    assert 0 <= pooled.num_samples - 1024 * stretch < config.batch_size
