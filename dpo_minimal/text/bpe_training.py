"""The merges of a byte-pair encoding, learnt from words and how often they occur.

All words stand in one linked list, so that a merge costs what it has places, however long the words are.
But: no cutting of texts into words; that is tokenizer.py's.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from itertools import pairwise

_BORDER, _GONE = -1, -2  # between two words; the right part of what was merged


def learn_merges(words: Counter[bytes], most: int) -> list[tuple[int, int]]:
    """At most `most` merges (left id, right id); the k-th makes id 256 + k.

    The most frequent pair goes first, of equals the one with the smallest ids; one that occurs once, never.
    """
    symbols, weights = [_BORDER], [0]  # of each place: a byte of a word, and how often the word occurs
    for word, count in words.items():
        symbols += [*word, _BORDER]
        weights += [count] * (len(word) + 1)
    after, before = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
    counts: Counter[tuple[int, int]] = Counter()
    where = defaultdict(list)  # pair -> places of its left part, from left to right, or once so
    for place, pair in enumerate(pairwise(symbols)):
        if _BORDER not in pair:
            counts[pair] += weights[place]
            where[pair].append(place)
    heap = [(-count, pair) for pair, count in counts.items()]  # smallest first: frequent, then low ids
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while len(merges) < most and heap:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count < 2:
            break
        if counts[pair] != -negative_count:
            continue  # an entry from before the count changed
        new = 256 + len(merges)
        merges.append(pair)
        changes: Counter[tuple[int, int]] = Counter()
        for place in where.pop(pair):
            other = after[place]
            if (symbols[place], symbols[other]) != pair:
                continue  # "aaa" has "aa" twice, but only one can be merged
            left, right, count = before[place], after[other], weights[place]
            changes[pair] -= count
            if (neighbour := symbols[left]) != _BORDER:
                changes[neighbour, pair[0]] -= count
                changes[neighbour, new] += count
                where[neighbour, new].append(left)
            if (neighbour := symbols[right]) != _BORDER:
                changes[pair[1], neighbour] -= count
                changes[new, neighbour] += count
                where[new, neighbour].append(place)
            symbols[place], symbols[other] = new, _GONE
            after[place], before[right] = right, place
        for changed, change in changes.items():
            if change:
                counts[changed] += change
                heapq.heappush(heap, (-counts[changed], changed))
    return merges
