import itertools
import tracemalloc

import numpy as np
import pytest

from m2t_accel.config.recipes import build_config
from m2t_accel.data import order as order_module
from m2t_accel.data.order import PooledOrder, ShuffledOrder, permute


def settings(batch_size=16, device_batch_size=4, **others):
    return build_config(
        {"recipe": "digits", "batch_size": batch_size, "device_batch_size": device_batch_size, **others}
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100, 1437, 65_537])
def test_permute_is_a_permutation(size):
    for key in ((0, 0, 0), (0, 0, 1), (5, 1, 2)):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_each_position_is_permuted_independently_of_the_others():
    whole = permute(np.arange(1000), 1000, (0, 7, 3))
    assert np.array_equal(permute(np.array([[17, 999], [0, 500]]), 1000, (0, 7, 3)), whole[[[17, 999], [0, 500]]])


def test_permutations_look_random():
    """Over many keys, each of 12 positions goes to each of 12 equally often; and neighbours end up unrelated."""
    number, size = 3000, 12
    drawn = np.stack([permute(np.arange(size), size, (0, seed, 0)) for seed in range(number)])
    counts = np.stack([np.bincount(drawn[:, i], minlength=size) for i in range(size)])
    chi_square = ((counts - number / size) ** 2 / (number / size)).sum()
    assert chi_square < 200  # 121 degrees of freedom: chance exceeds 182 once in 5000
    large = permute(np.arange(100_000), 1_281_167, (0, 0, 0)).astype(float)
    for lag in (1, 2, 32, 256):
        assert abs(np.corrcoef(large[:-lag], large[lag:])[0, 1]) < 0.012
    assert large.mean() == pytest.approx(1_281_167 / 2, rel=0.01)
    assert np.abs(np.diff(large)).mean() == pytest.approx(1_281_167 / 3, rel=0.01)


def reference_permute(position, size, key):
    """A second implementation, on Python integers: a Feistel network of eight rounds with cycle walking."""
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
    """The output of SplitMix64 at a state."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


@pytest.mark.parametrize("size", [1, 2, 12, 1437, 1_281_167, 5 * 10**9, 2**62])
def test_permute_equals_the_second_implementation(size):
    for key in ((0, 0, 0), (0, 2**32 - 1, 299)):
        positions = np.random.default_rng(0).integers(0, size, 50)
        expected = [reference_permute(position, size, key) for position in positions.tolist()]
        assert permute(positions, size, key).tolist() == expected


def test_the_order_is_the_same_with_every_release_of_this_package_and_of_numpy():
    """If it changed, a resumed run would show some images twice and others not at all."""
    config = settings(seed=5)
    assert ShuffledOrder(1_281_167, config).sub_batch(3, 1000).tolist() == [794908, 1124298, 505609, 62319]
    pooled = PooledOrder(np.full(50, 10, np.int32), config)
    pool = pooled.pool(3, 2, 0)
    assert pooled.order[:8].tolist() == [10, 32, 20, 33, 21, 24, 11, 40]
    assert pool.segments[:3] == [(5, 8, 10), (8, 0, 10), (14, 0, 10)]
    assert pool.shuffle[:8].tolist() == [119, 65, 63, 78, 44, 87, 81, 30]


def test_each_epoch_and_seed_has_its_own_order():
    orders = {tuple(permute(np.arange(50), 50, (0, seed, epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_an_epoch_shows_each_sample_once_up_to_the_dropped_last_batch():
    shuffled = ShuffledOrder(1003, settings())
    shown = np.concatenate([shuffled.sub_batch(2, index) for index in range(1003 // 16 * 4)])
    assert len(set(shown.tolist())) == len(shown) == 992


@pytest.mark.parametrize("size", [10**9, 5 * 10**9])  # the second exceeds 32 bits
def test_billions_of_samples_are_shuffled_in_10_megabytes(size):
    config = settings(batch_size=1024 * 32, device_batch_size=32)
    tracemalloc.start()
    shuffled = ShuffledOrder(size, config)
    some = np.concatenate([shuffled.sub_batch(0, index) for index in range(0, size // 32, 10**6)])
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert len(np.unique(some)) == len(some) == -(-size // 32 // 10**6) * 32
    assert 0 <= some.min() < size // 50
    assert size // 50 * 49 < some.max() < size


def samples_of(pooled, epoch, device):
    """Return the (piece, row) pairs that a virtual device sees in an epoch, in order."""
    seen = []
    for index in range(-(-pooled.steps // pooled.pool_batches)):
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
    monkeypatch.setattr(order_module, "POOL_SIZE", pool_size)
    monkeypatch.setattr(order_module, "MIN_POOL_BATCHES", 2)
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
    assert samples_of(pooled, 0, 0) == first  # after the second epoch was computed
    pieces = [piece for piece, _ in first[:4]]
    assert len(set(pieces)) > 1  # a sub-batch mixes several pieces


def test_every_pool_has_its_own_shuffle(monkeypatch):
    monkeypatch.setattr(order_module, "POOL_SIZE", 16)
    sizes = np.full(1000, 10, np.int32)
    pooled, reseeded = PooledOrder(sizes, settings()), PooledOrder(sizes, settings(seed=1))
    pools = list(itertools.product((0, 1), (0, 3), (0, 1)))  # epoch, device, index
    shuffles = [order.pool(*pool).shuffle.tobytes() for order in (pooled, reseeded) for pool in pools]
    assert len(set(shuffles)) == len(shuffles) == 16


SIZES = {  # rows of each piece
    "ImageNet in row groups of 100": np.full(12_812, 100, np.int32),
    "a billion samples, 100 000 shards of one": np.full(100_000, 10_000, np.int32),
    "three billion samples, more than 31 bits": np.full(30_000, 100_000, np.int32),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_order_of_one_of_1024_processes_takes_200_megabytes(name):
    """And the stretches of all processes are equally long and do not overlap."""
    config = settings(batch_size=1024 * 32, device_batch_size=32)
    tracemalloc.start()
    pooled = PooledOrder(SIZES[name], config)
    pool = pooled.pool(epoch=3, device=1023, index=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    assert pooled.steps == SIZES[name].sum(dtype=np.int64) // config.batch_size
    assert len(pool.shuffle) == min(pooled.steps, 8) * 32
    # The stretches lie end to end and cover the sequence up to the dropped last batch.
    stretch = pooled.steps * 32
    for device in (0, 1, 511, 1023):
        first = next(pooled.segments(device * stretch, device * stretch + 1))
        place = np.flatnonzero(pooled.order == first.piece)[0]
        assert pooled.ends[place] - pooled.piece_sizes[first.piece] + first.first == device * stretch
    assert 0 <= pooled.num_samples - 1024 * stretch < config.batch_size
