"""Helpers of the text tasks: vocabularies, padded arrays of word numbers, and made-up sentences for tests."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from metaadamw_lite.experiments.task import Batch

PAD, UNK = 0, 1


def vocabulary(texts: Iterable[Sequence[str]], specials: Sequence[str], size: int, min_freq: int = 1) -> list[str]:
    """Return the words with a number, in the order of their numbers.

    Special words come first, then the most frequent ones, ties in the order of the alphabet.

    Args:
        texts: sequences of words. Special words in them do not count.
        specials: the words with the first numbers; "<pad>" and "<unk>" are the first two.
        size: the most words, specials included.
        min_freq: the fewest occurrences of a word with a number.
    """
    counts = Counter(word for words in texts for word in words)
    ranked = sorted((-count, word) for word, count in counts.items() if count >= min_freq and word not in specials)
    return [*specials, *(word for _, word in ranked[: size - len(specials)])]


def encode(texts: Iterable[Sequence[str]], words: Sequence[str]) -> list[list[int]]:
    """Return the numbers of words; words without a number become ``UNK``."""
    numbers = {word: number for number, word in enumerate(words)}
    return [[numbers.get(word, UNK) for word in text] for text in texts]


def padded(rows: Sequence[Sequence[int]], length: int) -> "np.ndarray[Any, np.dtype[np.int16]]":
    """Cut rows of word numbers, or fill them at the end with ``PAD``, to an array (N, length)."""
    array = np.full((len(rows), length), PAD, dtype=np.int16)  # int16: all vocabularies have 25,000 words or fewer
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = row[:length]
    return array


def trimmed(batch: Batch) -> Batch:
    """Drop the last columns of arrays of word numbers that are padding in every row; return int64."""
    return tuple(x[:, : max(1, int((x != PAD).any(dim=0).sum()))].long() for x in batch)


def made_up_sentences(count: int, length: int, rng: np.random.Generator) -> list[list[str]]:
    """Make sentences of made-up words for tests, from half of ``length`` up to ``length``; word k follows word k−1."""
    words = 60
    starts, lengths = rng.integers(0, words, count), rng.integers(length // 2, length + 1, count)
    noise = rng.random((count, length)) < 0.2
    return [
        [f"w{rng.integers(words) if noise[i, k] else (start + k) % words}" for k in range(n)]
        for i, (start, n) in enumerate(zip(starts, lengths, strict=True))
    ]
