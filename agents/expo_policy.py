"""EXPO's on-the-fly (OTF) operator: base samples, bounded edits of them, and the choice among both by score.

It knows no network: samples are given, `edit` and `score` are functions. arXiv 2507.07986; `o2o.agents.expo` says where
it is used. Candidates are ordered: first the N base samples, then the edited ones.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from o2o.types import Array

Selection = Literal["max", "soft"]
Edit = Callable[[Array, Array], Array]
"""(key, actions `[n, ..., A]`) to edits in (-1, 1), `[n, ..., A]`, before the scale."""
Score = Callable[[Array, Array], Array]
"""(key, candidates `[K, ..., A]`) to scores `[K, ...]`."""


class Choice(NamedTuple):
    """What the operator chose, and from what."""

    actions: Array
    """Chosen actions `[..., A]`."""
    place: Array
    """Their places among the K candidates, `[...]`; those from N on are edited."""
    candidates: Array
    """`[K, ..., A]`."""
    scores: Array
    """`[K, ...]`; zeros where there was nothing to choose."""
    entropy: Array
    """Entropy of the choice, `[...]`; 0 for `max`."""


def select(scores: Array, rng: Array, selection: Selection, inverse_temperature: float) -> tuple[Array, Array]:
    """Return the chosen places `[...]` among scores `[K, ...]` and the choice's entropy `[...]`.

    `max` takes the best; `soft` draws with probability proportional to exp(inverse_temperature * score).
    """
    if selection == "max":
        return jnp.argmax(scores, axis=0), jnp.zeros(scores.shape[1:])
    log_weights = jax.nn.log_softmax(inverse_temperature * scores, axis=0)
    entropy = -jnp.sum(jnp.exp(log_weights) * log_weights, axis=0)
    return jax.random.categorical(rng, log_weights, axis=0), entropy


def on_the_fly(
    samples: Array,
    edit: Edit,
    score: Score,
    rng: Array,
    *,
    n_edits: int,
    scale: float,
    clip: bool = False,
    selection: Selection = "max",
    inverse_temperature: float = 1.0,
) -> Choice:
    """Choose among base `samples [N, ..., A]` and edits a + scale * u of the first `n_edits` of them.

    A single sample is returned as it is: neither edited nor scored. `clip` keeps edited candidates in [-1, 1].
    """
    edit_rng, score_rng, select_rng = jax.random.split(rng, 3)
    lead = samples.shape[1:-1]
    if samples.shape[0] == 1:
        nothing = jnp.zeros(lead)
        return Choice(samples[0], jnp.zeros(lead, jnp.int32), samples, nothing[None], nothing)
    candidates = samples
    if n_edits:
        edited = samples[:n_edits] + scale * edit(edit_rng, samples[:n_edits])
        candidates = jnp.concatenate([samples, jnp.clip(edited, -1.0, 1.0) if clip else edited])
    scores = score(score_rng, candidates)
    place, entropy = select(scores, select_rng, selection, inverse_temperature)
    chosen = jnp.take_along_axis(candidates, place[None, ..., None], axis=0)[0]
    return Choice(chosen, place, candidates, scores, entropy)
