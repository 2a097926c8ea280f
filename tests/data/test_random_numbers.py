import numpy as np
import pytest

from m2t_accel.data import random_numbers

MASK = 2**64 - 1


def reference_splitmix(state, count):
    """SplitMix64, one number at a time."""
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def test_the_reference_gives_the_published_numbers_of_seed_1234567():
    assert list(reference_splitmix(1234567, 3)) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", [0, 1, 1234567, 2**63, MASK])
def test_uniforms_equal_the_reference(key):
    expected = [[value / 2**64 for value in reference_splitmix(seed, 40)] for seed in (key, 3)]
    found = random_numbers.uniforms(np.array([key, 3], np.uint64), 40)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-53)
    assert found.max() < 1


def test_a_key_depends_on_each_word_and_on_their_order():
    words = np.arange(3000)
    tables = [random_numbers.derive_keys(*key) for key in ((1, words), (words, 2), (1, words, 0), (0, words), (words,))]
    assert tables[0][2] == tables[1][1] == random_numbers.derive_keys(1, 2)  # two tables hold it, and two hold (0, 2)
    assert len(np.unique(np.concatenate(tables))) == 5 * 3000 - 2
    assert random_numbers.derive_keys(2**64 - 1, 2**32 - 1).shape == (1,)


def test_neighbouring_keys_have_uncorrelated_uniform_numbers():
    numbers = random_numbers.uniforms(random_numbers.derive_keys(1, 0, 0, np.arange(20000), 0), 8)
    following = random_numbers.uniforms(random_numbers.derive_keys(1, 0, 0, np.arange(20000), 1), 8)
    table = np.concatenate([numbers, np.roll(numbers, 1, axis=0), following], axis=1)
    correlation = np.corrcoef(table, rowvar=False) - np.eye(24)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(20000)  # 276 pairs exceed it once in 500 tests
    assert numbers.mean() == pytest.approx(0.5, abs=4 / np.sqrt(12 * numbers.size))
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    assert ((counts - numbers.size / 64) ** 2 / (numbers.size / 64)).sum() < 63 + 4 * np.sqrt(2 * 63)
