"""Near-duplicates among the captions of a job.

Two captions say almost the same when, with the class names masked, their sets of three-word runs have a Jaccard index
of THRESHOLD or more. At 0.85 a text of 40 words may differ in one word, one of 20 in none: in the short fixed phrases
of the `attributes` engine a single word is a measurement ("a wide frame", "a tall frame"), while a language model's 45
words that differ in one are a copy. Candidates come from MinHash signatures (Broder 1997) cut into bands (Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, 3.4); each is then compared exactly."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from services.captioner.quality.words import masked, words

THRESHOLD = 0.85
SHINGLE = 3  # words
# A pair of similarity s becomes a candidate with probability 1 - (1 - s^8)^20: 0.998 at 0.85, 0.08 at 0.5, 0.001 at
# 0.3.
BANDS, ROWS = 20, 8
# Where thousands of texts resemble each other, each is held against the likeliest few only: time stays linear. A pair
# of 0.85 shares 5 bands of 20 on average, one of 0.5 next to none.
_WALKED, _COMPARED = 256, 64  # newest kept texts of a bucket; candidates of a text

Bools = NDArray[np.bool_]
Hashes = NDArray[np.uint64]

_FACTORS = np.random.default_rng(0).integers(1, 2**63, BANDS * ROWS + SHINGLE + 1, dtype=np.uint64) | np.uint64(1)
_MINHASH, _MIX, _WORDS = _FACTORS[: -SHINGLE - 1], _FACTORS[-SHINGLE - 1], _FACTORS[-SHINGLE:]
_HALF = np.uint64(32)
_NO_WORDS = 0  # the hash of nothing but padding
_ALONE = np.uint32(2**32 - 1)


class Duplicates:
    """Add the captions in the order in which an earlier one takes precedence, then `find`. Keeps numbers of
    them, not their texts."""

    def __init__(self) -> None:
        self._shingles = array("I")  # hashes of three-word runs, sorted within each caption, without repetition
        self._starts = array("Q", [0])  # of each caption in _shingles; one more at the end
        self._classes = array("I")
        self._class_ids: dict[str, int] = {}
        self._bands = array("I")  # BANDS keys a caption

    def add(self, texts: Sequence[str], display_names: Sequence[str]) -> None:
        """The next captions, each with its class's display name."""
        if not texts:
            return
        shingles, sizes = _shingle([masked(name, words(text)) for text, name in zip(texts, display_names, strict=True)])
        ends = np.cumsum(sizes)
        self._bands.frombytes(_band_keys(shingles, ends - sizes).tobytes())
        self._starts.frombytes((ends + self._starts[-1]).astype(np.uint64).tobytes())
        self._shingles.frombytes(shingles.astype(np.uint32).tobytes())
        self._classes.extend(self._class_ids.setdefault(name, len(self._class_ids)) for name in display_names)

    def find(self, on_step: Callable[[int], None] = lambda done: None) -> tuple[Bools, Bools]:
        """-> (duplicate, duplicate of another class), one bool a caption, in the order added.

        In that order a caption is kept, unless it is near a kept one of its class. Kept captions of two classes that
        are near each other are both duplicates of another class, and so is what was dropped for either. Captions
        without a word are neither. `on_step(done)` is called every 1,000 captions and may raise. To be called once."""
        total = len(self._classes)
        across = np.zeros(total, np.bool_)
        if not total:
            return across, across
        keys = np.frombuffer(self._bands, np.uint32).reshape(total, BANDS)
        stands_for = self._first_equal(keys)  # the caption for which this one was dropped
        firsts, buckets = _buckets(keys, np.flatnonzero(stands_for == np.arange(total)))
        del keys
        self._bands = array("I")
        owners = np.repeat(np.arange(total, dtype=np.int32), np.diff(firsts))
        # A bucket's kept entries as a linked list, the newest first: Python lists would take ten times the memory.
        newest = array("i", [-1]) * (int(buckets.max(initial=-1)) + 1)
        before = array("i", [-1]) * len(buckets)
        for i in range(total):
            if i % 1000 == 0:
                on_step(i)
            entries = range(firsts[i], firsts[i + 1])
            if not entries or self._shingles[self._starts[i]] == _NO_WORDS:
                continue
            shared: Counter[int] = Counter()  # bands in common
            for bucket in buckets[entries.start : entries.stop].tolist():
                entry, left = newest[bucket], _WALKED
                while entry >= 0 and left:
                    shared[int(owners[entry])] += 1
                    entry, left = before[entry], left - 1
            candidates = {j for j, _ in shared.most_common(_COMPARED)}
            own_class = {j for j in candidates if self._classes[j] == self._classes[i]}
            if same := self._near(i, own_class):
                stands_for[i] = min(same)
                continue
            if others := self._near(i, candidates - own_class):
                across[[i, *others]] = True
            for entry in entries:
                before[entry], newest[buckets[entry]] = newest[buckets[entry]], entry
        kept = stands_for[stands_for]  # what an equal text stands for may itself have been dropped
        words_there = np.frombuffer(self._shingles, np.uint32)[np.frombuffer(self._starts, np.uint64)[:-1]] != _NO_WORDS
        return (kept != np.arange(total)) & words_there, across[kept]

    def _first_equal(self, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
        """(captions,) the first caption of the class with the same keys, which is to say the same text."""
        whole = np.frombuffer(self._classes, np.uint32).astype(np.uint64)
        for band in range(BANDS):
            whole = (whole ^ keys[:, band]) * _MIX
            whole ^= whole >> _HALF
        _, first, group = np.unique(whole, return_index=True, return_inverse=True)
        return first[group]

    def _near(self, i: int, candidates: Iterable[int]) -> list[int]:
        """Those with a Jaccard index of THRESHOLD or more."""
        starts, shingles = self._starts, self._shingles
        mine = set(shingles[starts[i] : starts[i + 1]])
        near = []
        for j in candidates:
            size = starts[j + 1] - starts[j]
            if min(size, len(mine)) < THRESHOLD * max(size, len(mine)):
                continue
            common = len(mine.intersection(shingles[starts[j] : starts[j + 1]]))
            if common >= THRESHOLD * (size + len(mine) - common):
                near.append(j)
        return near


def _shingle(texts: Sequence[Sequence[str]]) -> tuple[Hashes, NDArray[np.int64]]:
    """-> (32-bit hashes of every text's three-word runs, one text after the other, sorted and without repetition within
    a text; how many each text has, at least 1). Texts shorter than a run are padded."""
    known = {word: crc32(word.encode()) for text in texts for word in text}
    padding = [_NO_WORDS] * SHINGLE
    coded = [[*map(known.__getitem__, text), *padding[len(text) :]] for text in texts]
    owner = np.repeat(np.arange(len(coded), dtype=np.uint64), [len(text) for text in coded])
    flat = np.array([word for text in coded for word in text], np.uint64)
    runs = len(flat) - SHINGLE + 1
    hashes = sum((flat[k : k + runs] * _WORDS[k] for k in range(SHINGLE)), np.zeros(runs, np.uint64))
    hashes = ((hashes ^ (hashes >> _HALF)) * _MIX) >> _HALF
    within = owner[:runs] == owner[SHINGLE - 1 :]
    both = np.unique((owner[:runs][within] << _HALF) | hashes[within])
    return both & np.uint64(2**32 - 1), np.bincount((both >> _HALF).astype(np.int64), minlength=len(texts))


def _band_keys(shingles: Hashes, starts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """(texts, BANDS): texts of the same shingles have the same keys, similar ones probably some."""
    keys = np.empty((len(starts), BANDS), np.uint32)
    hashed = np.empty_like(shingles)
    for band in range(BANDS):
        key = np.full(len(starts), band, np.uint64)
        for factor in _MINHASH[band * ROWS : (band + 1) * ROWS]:
            np.multiply(shingles, factor, out=hashed)  # wraps: multiply-shift hashing
            key = (key ^ (np.minimum.reduceat(hashed, starts) >> _HALF)) * _MIX
        keys[:, band] = key >> _HALF
    return keys


def _buckets(keys: NDArray[np.uint32], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Of the (texts, BANDS) keys only those that several of the texts in `rows` have. -> (firsts, buckets): the text i
    is in the buckets `buckets[firsts[i] : firsts[i + 1]]`, numbered from 0. Overwrites `keys`."""
    numbered = np.zeros(1, np.int64)  # buckets so far
    for band in range(BANDS):
        order = rows[np.argsort(keys[rows, band])]
        column = keys[order, band]
        same = np.concatenate([[False], column[1:] == column[:-1], [False]])
        shared = same[:-1] | same[1:]
        numbers = numbered + np.cumsum(shared & ~same[:-1])
        keys[:, band] = _ALONE
        keys[order, band] = np.where(shared, numbers - 1, _ALONE)
        numbered = numbers[-1:]
    shared = keys != _ALONE
    firsts = np.zeros(len(keys) + 1, np.int64)
    np.cumsum(np.count_nonzero(shared, axis=1), out=firsts[1:])
    return firsts, keys[shared].astype(np.int32)
