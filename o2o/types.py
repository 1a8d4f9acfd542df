"""Shared types: batches, metrics, the agent protocol and the schedule that an agent asks the online loop for."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

import jax
from flax import struct

from o2o.errors import ConfigError

Array = jax.Array
Batch = dict[str, Any]
"""`observations [..., D]`, `actions [..., A]`, `rewards [...]`, `masks [...]` (1 - terminated),
`next_observations [..., D]` and, where the agent `needs` it, `mc_returns [...]`. Leading axes: `[utd, B]`; for an agent
with a `window` W > 1 `[utd, B, W]`, and `ends` (1 at every episode end) and `valid` (1 up to and including the first)
come with them."""
Info = dict[str, Array]
"""Scalar metrics, keys such as `critic/loss`; they stay on the device until a logger reads them."""
Params = Any
Carry = Any
"""What a policy remembers between two steps of one episode; `None` for a memoryless one. What it still has to play of a
chunk is an `o2o.rl.chunks.ActionQueue`, which a human's takeover ends too."""

Replay = Literal["online", "mixed", "append", "rollout", "none"]


@dataclass(frozen=True)
class OnlineConfig:
    """How an agent wants its online phase to be driven; read by the loop, kept in the agent's config.

    What is read depends on `replay`: with `online`, `append` and `mixed` all but `num_envs` and `rollout_steps`, though
    `offline_ratio` with `mixed` alone; with `rollout` only those two, all others keep their defaults; with `none` only
    `random_steps`, the others for when it is evaluated.
    """

    utd_ratio: int = 1
    """Critic updates per environment step (update-to-data ratio)."""
    warmup_steps: int = 0
    """Environment steps with the loaded policy, stored, before the first update (WSRL's K)."""
    random_steps: int = 0
    """Environment steps with uniform random actions before the policy acts; no update before their end."""
    min_rows: int = 0
    """The first update waits until the online buffer holds more rows than this."""
    replay: Replay = "online"
    """Where online batches come from: `online` the run's own transitions only; `mixed` a share `offline_ratio` of each
    minibatch from the dataset; `append` one buffer that starts with the whole dataset; `rollout` no buffer: the newest
    `rollout_steps` steps in order of time, once; `none` no update at all."""
    offline_ratio: float = 0.5
    """Share of dataset rows in each minibatch when `replay` is `mixed`."""
    initial_updates: int = 0
    """Updates in one go just before the first online update, on leaves `[1, B, ...]`; the agent counts for itself which
    of its networks take part (ResFiT warms its critic up so)."""
    num_envs: int = 1
    """Environments per seed that are stepped together (`rollout` only)."""
    rollout_steps: int = 2048
    """Environment steps, of all `num_envs` together, from one update to the next (`rollout` only)."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a count or share that is none."""
        if self.utd_ratio < 1:
            raise ConfigError(f"utd_ratio is {self.utd_ratio}; expected at least 1")
        if not 0.0 <= self.offline_ratio <= 1.0:
            raise ConfigError(f"offline_ratio is {self.offline_ratio}; expected 0 to 1")

    def first_update(self) -> int:
        """Return the zero-based online step after whose insertion the first update runs."""
        return max(self.random_steps, max(self.warmup_steps, self.min_rows) + 1)

    def check_rollout(self) -> None:
        """Raise `ConfigError` for what replay `rollout` cannot do, or would not read."""
        if self.num_envs < 1 or self.rollout_steps < self.num_envs or self.rollout_steps % self.num_envs:
            raise ConfigError(
                f"online.rollout_steps is {self.rollout_steps} with num_envs {self.num_envs}; expected a multiple of "
                "the number of environments, such as 2048 with 8"
            )
        for name in ("utd_ratio", "warmup_steps", "random_steps", "min_rows", "offline_ratio", "initial_updates"):
            value, default = getattr(self, name), getattr(OnlineConfig, name)
            if value != default:
                raise ConfigError(
                    f"online.{name} is {value}, which an on-policy agent does not read; leave it at {default}"
                )


@runtime_checkable
class Agent(Protocol):
    """What the loops need of an agent: a pytree (derive it from `AgentNode`), pure methods, a frozen config.

    `batch_size` rows per minibatch and `online` (an `OnlineConfig`) are read from `config`. Optional parts:
    `window: int`, the rows in a row that it learns from (`window_of`); `random_actions(observations, rng)`, which
    returns the actions `[..., A]` of `online.random_steps` in place of uniform ones; `stages`, pre-training in several
    parts (`Staged`); `check_data(data)`, which raises `DatasetError` for a dataset that it cannot learn from;
    `remark(steps)`, a line to print before a pre-training of so many gradient steps, or None. With `online.replay`
    "rollout" the leaves of an online `update` are `[T, num_envs, ...]`, in order of time, with `ends`.
    """

    config: Any
    needs: ClassVar[tuple[str, ...]]
    """Batch keys beyond the usual five."""

    @classmethod
    def create(cls, rng: Array, observations: Any, actions: Any, config: Any = ...) -> Self:
        """Initialise from a key and one example batch: observations `[B, D]`, actions `[B, A]` (only shapes matter)."""
        ...

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run the updates of one call on leaves `[utd, B, ...]`."""
        ...

    def sample_actions(
        self, observations: Any, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1] for observations `[..., D]`, and the next carry."""
        ...

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Carry:
        """Return the carry of fresh episodes, leaves `[*batch_shape, ...]`; `None` if the policy has no memory."""
        ...

    def online(self) -> Self:
        """Return the agent for the online phase: all that changes at the switch happens here."""
        ...


class AgentNode(struct.PyTreeNode):
    """The base class of agents: a frozen pytree whose structure tells its class.

    JAX's registered dataclasses do not: the structures of two classes compare equal if only their fields agree, and
    `jax.jit` may then run the program of one on the other (JAX 0.10; seen with a class and a subclass of it).
    """

    agent_class: Any = struct.field(pytree_node=False, default=None, kw_only=True, repr=False)
    """Set by the class itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "agent_class", type(self))


class Stage(NamedTuple):
    """One part of a pre-training that has several."""

    name: str
    """What the agent knows it by; empty where the whole pre-training is `update`."""
    steps: int
    """Its gradient steps."""
    every: int = 0
    """Gradient steps between two calls of `Staged.judge`; 0 for none."""


class Staged(Protocol):
    """An agent that pre-trains in stages, each with batches of its own making."""

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """Return the stages of a pre-training of `steps` gradient steps, which theirs add up to."""
        ...

    def prepare(self, data: Any, stage: str) -> Self:
        """Return the agent ready for a stage; runs once before it, not traced. `data` has `rows`, leaves `[N, ...]`."""
        ...

    def pretrain(self, data: Any, stage: str, progress: Array) -> tuple[Self, Info]:
        """Run one gradient step of a stage, at `progress` `[]` in [0, 1) of it."""
        ...

    def judge(self, data: Any, stage: str) -> Self:
        """Look at what the stage has made so far, every `Stage.every` steps and at its end."""
        ...


@dataclass(frozen=True)
class Preset:
    """An agent's settings for a family of tasks: the paper's, or small ones that show the same effect on a laptop."""

    config: Any
    """The agent's config dataclass."""
    offline_steps: int
    """Gradient steps of pre-training."""
    online_steps: int
    """Environment steps of the online phase, warm-up included."""
    reward: tuple[float, float] | None = None
    """(scale, bias) that this agent's paper applies to the task's raw reward; `None` for the task's own."""
    only_successes: bool = False
    """Whether this agent's paper leaves episodes without success out of a binary task's dataset."""
    normalize_returns: float | None = None
    """Distance of the dataset's best and worst return once rewards are scaled; `None` leaves them."""


def window_of(agent: Any) -> int:
    """Return how many rows in a row the agent's batches hold; 1 for plain transitions."""
    return int(getattr(agent, "window", 1))


def stages_of(agent: Any, steps: int) -> tuple[Stage, ...]:
    """Return the stages of a pre-training of `steps` gradient steps: one without a name for most agents."""
    return agent.stages(steps) if hasattr(agent, "stages") else (Stage("", steps),)
