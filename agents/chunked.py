"""Chunks of actions, shared by the agents that know them ("Q-chunking", arXiv 2507.07969); not an agent.

With `chunk` h above 1 an agent's action is h actions in a row, `[..., h A]`, judged as one and played open loop.
`ChunkedConfig.transitions` makes one-step transitions of the windows, so that the losses of a one-step method serve
both. `play` and `fresh_queue` play the chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from o2o.rl.chunks import ActionQueue, empty_queue, next_action
from o2o.rl.windows import chunk_transitions
from o2o.settings import Count
from o2o.types import AgentConfig, Array, Batch, Carry, Needs


@dataclass(frozen=True)
class ChunkedConfig(AgentConfig):
    """Settings of agents that may act by chunks."""

    chunk: Count = 1
    """Actions h in a row that are judged and played as one."""
    pad_terminal: bool = True
    """True: windows that a true terminal cuts short count, with the last action repeated. False: they are dropped."""

    @property
    def needs(self) -> Needs:
        """Windows of one chunk."""
        return Needs(window=self.chunk)

    def transitions(self, batch: Batch) -> Batch:
        """Return leaves `[utd, B, h, ...]`, or with h = 1 `[utd, B, ...]`, as transitions of whole chunks."""
        return chunk_transitions(batch, self.chunk, self.discount, self.pad_terminal)


def play(chunk: int, carry: Carry, propose: Callable[[], Array]) -> tuple[Array, Carry]:
    """Return the next actions `[..., A]` of the chunks being played, and the queues without them.

    `propose()` gives new chunks `[..., h A]`; they are taken where a queue is empty, at every step with h = 1.
    """
    if chunk == 1:
        return propose(), carry

    def chunks() -> Array:
        flat = propose()
        return flat.reshape(*flat.shape[:-1], chunk, -1)

    return next_action(carry, chunks, chunk)


def fresh_queue(chunk: int, batch_shape: tuple[int, ...], action_dim: int) -> ActionQueue | None:
    """Return empty queues `[*batch_shape, h, A]`; `None` with h = 1, where nothing is remembered."""
    return None if chunk == 1 else empty_queue(batch_shape, chunk, action_dim)
