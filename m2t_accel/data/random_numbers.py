"""Random numbers as a function of what they are for, many at once: SplitMix64 over arrays.

Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (OOPSLA 2014). Of numpy's own generators
one would have to be made for each key, which takes longer than all the numbers of a view.
"""

from __future__ import annotations

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # the step between two states: 2^64 over the golden ratio, made odd


def mixed(states: np.ndarray) -> np.ndarray:
    """SplitMix64's output for uint64 states, of their shape: a bijection after which neighbours look unrelated."""
    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))


def keys_of(*words: int | np.ndarray) -> np.ndarray:
    """A key for each combination of words, numbers of [0, 2^64) or arrays (N,) of them: (N,) uint64."""
    keys = np.zeros(1, np.uint64)
    for word in words:
        keys = mixed((keys + GOLDEN_GAMMA) ^ np.asarray(word).astype(np.uint64))
    return keys


def uniforms(keys: np.ndarray, number: int) -> np.ndarray:
    """The first numbers of the generator that starts at each key (N,): (N, number) float64 in [0, 1)."""
    states = keys[:, None] + GOLDEN_GAMMA * np.arange(1, number + 1, dtype=np.uint64)
    return (mixed(states) >> np.uint64(11)) * 2.0**-53
