"""Random numbers as a pure function of their key, computed for many keys at once: SplitMix64 over arrays.

numpy's own generators would need one object per key, and making it takes longer than drawing all numbers of a view.

Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # the step between two states: 2^64 over the golden ratio, made odd


def mix(states: np.ndarray) -> np.ndarray:
    """Return SplitMix64's output for uint64 states of any shape: a bijection that makes neighbours look unrelated."""
    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))


def derive_keys(*words: int | np.ndarray) -> np.ndarray:
    """Return one key, (N,) uint64, for each combination of words: numbers in [0, 2^64) or arrays (N,) of them."""
    keys = np.zeros(1, np.uint64)
    for word in words:
        keys = mix((keys + GOLDEN_GAMMA) ^ np.asarray(word).astype(np.uint64))
    return keys


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """Return the first numbers of the generator that each key (N,) seeds: (N, count) float64 in [0, 1)."""
    states = keys[:, None] + GOLDEN_GAMMA * np.arange(1, count + 1, dtype=np.uint64)
    return (mix(states) >> np.uint64(11)) * 2.0**-53
