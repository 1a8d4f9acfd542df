"""Held-out episodes: a part of a dataset that no update sees, for runs that have no environment to be judged in."""

from dataclasses import replace
from typing import Any

import numpy as np

from o2o.data.datasets import Dataset, Source
from o2o.errors import ConfigError

SPLIT_SEED = 0
"""Which episodes are held out does not depend on the seed of a run, so that runs compare."""


def split(data: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Return (the rest, the held-out `share` of the episodes); of two episodes or more at least one is held out.

    With the share 0, or one episode alone, nothing is held out and both are the whole dataset. Raises `ConfigError` if
    the share is not in [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise ConfigError(f"holdout is {share}; expected at least 0 and below 1, such as 0.1")
    ends = np.asarray(data.arrays["ends"], bool).copy()
    ends[[source.start + source.size - 1 for source in data.sources]] = True
    episode = np.concatenate([[0], np.cumsum(ends)[:-1]])
    episodes = int(episode[-1]) + 1
    count = min(max(round(share * episodes), 1), episodes - 1)
    if share == 0.0 or count == 0:
        return data, data
    owner = np.repeat(
        np.arange(len(data.sources)),
        [episode[source.start + source.size - 1] - episode[source.start] + 1 for source in data.sources],
    )
    left, chosen = np.bincount(owner), []
    for number in np.random.default_rng(SPLIT_SEED).permutation(episodes):
        if len(chosen) < count and left[owner[number]] > 1:  # every source keeps an episode
            left[owner[number]] -= 1
            chosen.append(number)
    held = np.isin(episode, chosen)
    return (_part(data, ~held), _part(data, held)) if chosen else (data, data)


def _part(data: Dataset, keep: np.ndarray) -> Dataset:
    """Return the rows where `keep` `[N]` is true, each source with its weight."""
    sizes = [int(keep[source.start : source.start + source.size].sum()) for source in data.sources]
    kept = [(size, source.weight) for size, source in zip(sizes, data.sources, strict=True) if size]
    starts = np.concatenate([[0], np.cumsum([size for size, _ in kept])[:-1]]).astype(int).tolist()
    total = sum(weight for _, weight in kept)
    sources = tuple(Source(start, size, weight / total) for start, (size, weight) in zip(starts, kept, strict=True))

    def take(entry: Any) -> Any:
        return {key: take(value) for key, value in entry.items()} if isinstance(entry, dict) else entry[keep]

    return replace(data, arrays=take(data.arrays), sources=sources)
