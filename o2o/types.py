"""Shared types: batches, metrics, the agent protocol and the schedule that an agent asks the online loop for."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import jax
from flax import struct

from o2o.errors import ConfigError
from o2o.settings import Amount, Count, Range, Settings, Share, short

Array = jax.Array
Batch = dict[str, Any]
"""`observations [..., D]`, `actions [..., A]`, `rewards [...]`, `masks [...]` (1 - terminated),
`next_observations [..., D]` and, where the agent `needs` it, `mc_returns [...]`. Leading axes: `[utd, B]`; for an agent
with a `window` W > 1 `[utd, B, W]`, and `ends` (1 at every episode end) and `valid` (1 up to and including the first)
come with them."""
Info = dict[str, Array]
"""Scalar metrics, keys such as `critic/loss`; they stay on the device until a logger reads them."""
PRIORITIES = "priorities"
"""What is no metric among those of `update`: new priorities `[utd, B]` of its rows (`Needs.priorities`)."""
Params = Any
Carry = Any
"""What a policy remembers between two steps of one episode; `None` for a memoryless one. What it still has to play of a
chunk is an `o2o.rl.chunks.ActionQueue`, which a human's takeover ends too."""

ReplayKind = Literal["online", "mixed", "append", "rollout", "none"]


@dataclass(frozen=True)
class OnlineConfig(Settings):
    """How an agent wants its online phase to be driven; read by the loop, kept in the agent's config.

    `replay` decides which fields are read. `online`, `append` and `mixed` read all but `rollout_steps`; only `mixed`
    reads `offline_ratio`. `rollout` reads `num_envs` and `rollout_steps` only, and the others must keep their defaults.
    `none` acts by `random_steps`; its other fields only set the times of evaluations.
    """

    utd_ratio: Count = 1
    """Critic updates of one update call. With `update_every` 1 that is the update-to-data ratio: critic updates per
    environment step, with any number of environments."""
    update_every: Count = 1
    """Environment steps, of all `num_envs` together, for each update call; `utd_ratio` / `update_every` critic updates
    for every row stored. The calls that N environments' step brings due run in a row after its N rows are stored."""
    warmup_steps: Amount = 0
    """Environment steps before updates are allowed (WSRL's K). The first update follows the second step after them."""
    random_steps: Amount = 0
    """Environment steps with uniform random actions before the policy acts; no update before their end."""
    min_rows: Amount = 0
    """The first update waits until the buffer held more rows than this before the current step."""
    replay: ReplayKind = "online"
    """Where online batches come from: `online` the run's own transitions only; `mixed` a share `offline_ratio` of each
    minibatch from the dataset; `append` one buffer that starts with the whole dataset; `rollout` no buffer: the newest
    `rollout_steps` steps in order of time, once; `none` no update at all."""
    offline_ratio: Share = 0.5
    """Share of dataset rows in each minibatch when `replay` is `mixed`."""
    initial_updates: Amount = 0
    """Updates in one go just before the first online update, on leaves `[1, B, ...]`; the agent counts for itself which
    of its networks take part (ResFiT warms its critic up so)."""
    num_envs: Annotated[int, Range(least=1, most=4096)] = 1
    """Environments per seed that are stepped together; a step of all of them counts as so many."""
    rollout_steps: Count = 2048
    """Environment steps, of all `num_envs` together, from one update to the next (`rollout` only)."""

    def first_update(self) -> int:
        """Return the number of the environment step, counted from 0, after which the first update runs."""
        return max(self.random_steps, max(self.warmup_steps, self.min_rows) + 1)

    def calls_due(self, env_steps: Any) -> Any:
        """Return how many update calls follow the step of all environments that begins at `env_steps`, traced or not.

        Each environment step from `first_update` on whose number, counted from 1, `update_every` divides brings one.
        """
        if self.replay == "none":
            return env_steps * 0
        late = self.first_update() - env_steps
        begin, end = env_steps + late * (late > 0), env_steps + self.num_envs
        due = end // self.update_every - begin // self.update_every
        return due * (due > 0)

    def check_rollout(self) -> None:
        """Raise `ConfigError` for what replay `rollout` cannot do, or would not read."""
        if self.num_envs < 1 or self.rollout_steps < self.num_envs or self.rollout_steps % self.num_envs:
            raise ConfigError(
                f"online.rollout_steps is {self.rollout_steps} with num_envs {self.num_envs}; expected a multiple of "
                "the number of environments, such as 2048 with 8"
            )
        for name in (
            "utd_ratio",
            "update_every",
            "warmup_steps",
            "random_steps",
            "min_rows",
            "offline_ratio",
            "initial_updates",
        ):
            value, default = getattr(self, name), getattr(OnlineConfig, name)
            if value != default:
                raise ConfigError(
                    f"online.{name} is {value}, which an on-policy agent does not read; leave it at {default}"
                )


@dataclass(frozen=True)
class Needs:
    """What an agent needs of its dataset, its replay and its run."""

    batch_keys: tuple[str, ...] = ()
    """Batch keys beyond the usual five: `mc_returns`, `next_actions`, `next_valid`. `ends` and `valid` come with a
    `window` above 1."""
    window: int = 1
    """Rows in a row that every entry of a minibatch holds; 1 for plain transitions."""
    base_policy: bool = False
    """Observations carry the action of a frozen base policy."""
    raw_observations: bool = False
    """The agent standardises observations itself, so the run must not normalise them."""
    action_margin: float = 0.0
    """Room beyond the range of the dataset's actions, relative to its half width (with `action_range="data"`)."""
    priorities: bool = False
    """Online, rows of the run's own buffer are drawn in proportion to priorities, which `update` returns anew as
    `PRIORITIES` among its metrics, above 0. A new row has the highest one. Their batches have `odds [B]`, how much
    likelier a row was drawn than by an even draw, and `slots [B]`, its place. A window is drawn by its first row.
    Draws from a dataset are even."""
    episode_returns: bool = False
    """`Agent.after_episodes` hears of every training episode that ends."""


@dataclass(frozen=True)
class AgentConfig(Settings):
    """The settings that every agent has; each agent's own config derives from it."""

    batch_size: Count = 256
    """Rows (or windows of rows) of one minibatch."""
    discount: Share = 0.99
    """Discount factor per step."""
    online: OnlineConfig = OnlineConfig()
    """Schedule of the online phase."""

    @property
    def needs(self) -> Needs:
        """What an agent with these settings needs of its data and its run."""
        return Needs()


@dataclass(frozen=True)
class ChunkedConfig(AgentConfig):
    """The settings of agents whose action may be a chunk of actions (`o2o.rl.chunks`, `o2o.rl.windows`)."""

    chunk: Count = 1
    """Actions h in a row that are judged and played as one."""
    pad_terminal: bool = True
    """True: windows that a true terminal cuts short count, with the last action repeated. False: they are dropped."""

    @property
    def needs(self) -> Needs:
        """Windows of one chunk."""
        return Needs(window=self.chunk)


@dataclass(frozen=True)
class Phase:
    """One part of an agent's pre-training on its dataset.

    The functions are plain functions or methods of the agent's class; each gets one seed's agent. `data` has `rows`,
    leaves `[N, ...]`, and `sample(rng, shape)`.
    """

    name: str
    """Name of the phase on the progress bar. Metrics say `offline`."""
    steps: int
    """Gradient steps."""
    update: Callable[[Any, Any, Array], tuple[Any, Info]] | None = None
    """One gradient step `(agent, data, progress)` that draws its own rows, `progress` `[]` in [0, 1) of the phase.
    None: `Agent.update` on minibatches that the loop draws."""
    enter: Callable[[Any, Any], Any] | None = None
    """`(agent, data)` to agent, called once before the first step, outside jit. It may fit statistics."""
    check: Callable[[Any, Any], Any] | None = None
    """`(agent, data)` to agent, jitted. It runs every `check_every` steps and at the end of the phase."""
    check_every: int = 0
    """Gradient steps between two calls of `check`; 0: at the end only."""
    note: str = ""
    """A line to show before the first step; empty for none."""


class Agent(struct.PyTreeNode):
    """The base class of agents: a frozen pytree of arrays, pure methods, a static config.

    An agent of your own defines its fields, `create`, `update`, `sample_actions` and `preset`; everything else has a
    default here. The structure of the pytree tells the class: JAX compares the fields of registered dataclasses only,
    so `jax.jit` could otherwise run the program of one class on another with equal fields.
    """

    agent_class: Any = struct.field(pytree_node=False, default=None, kw_only=True, repr=False)
    """Set by the class itself."""
    if TYPE_CHECKING:
        config: Any = struct.field(pytree_node=False, kw_only=True)
        """The agent's settings, an `AgentConfig`; each class has it as a field of its own type."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "__repr__" not in vars(cls):
            cls.__repr__ = Agent.__repr__  # a dataclass would print every parameter
        super().__init_subclass__(**kwargs)

    def __post_init__(self) -> None:
        object.__setattr__(self, "agent_class", type(self))

    def __repr__(self) -> str:
        count = sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(self))
        return f"{type(self).__name__}({count:,} numbers, {short(getattr(self, 'config', None))})"

    @property
    def needs(self) -> Needs:
        """What the agent in its present form needs. The online form may need fewer keys than the config, never more."""
        return self.config.needs

    @classmethod
    def create(cls, rng: Array, observations: Any, actions: Array, config: Any) -> Self:
        """Initialise from a key and one example batch: observations `[B, D]`, actions `[B, A]` (only shapes matter)."""
        raise NotImplementedError

    @classmethod
    def from_agent(cls, agent: Any, config: Any) -> Self:
        """Return an agent that starts from the networks of a pre-trained one (`init_from`).

        Raises `ConfigError`: agents start from their own pre-training unless they override this.
        """
        raise ConfigError(f"{cls.__name__} cannot start from another run; `init_from` is for wsrl and dsrl")

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run the updates of one call on leaves `[utd, B, ...]`, on a rollout on leaves `[T, num_envs, ...]`."""
        raise NotImplementedError

    def sample_actions(
        self, observations: Any, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1] for observations `[..., D]`, and the next carry."""
        raise NotImplementedError

    def random_actions(self, observations: Any, rng: Array, action_dim: int) -> Array:
        """Return the actions `[N, A]` of `online.random_steps` for observations `[N, D]`: uniform by default."""
        shape = jax.tree.leaves(observations)[0].shape[:1]
        return jax.random.uniform(rng, (*shape, action_dim), minval=-1.0, maxval=1.0)

    def after_episodes(self, returns: Array, lengths: Array, over: Array) -> Self:
        """Return the agent after training episodes with these raw returns and steps ended, all `[N]`, where `over`.

        N is the number of environments of one seed. Called, with `Needs.episode_returns`, before the next actions are
        chosen: the policy may change from one episode to the next.
        """
        return self

    def q_value(self, observations: Any, actions: Array) -> Array | None:
        """Return the value `[...]` of actions `[..., A]` at observations `[..., D]`, as the policy is judged by it.

        None: the agent has no Q of single actions.
        """
        return None

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Carry:
        """Return the carry of fresh episodes, leaves `[*batch_shape, ...]`; `None`: the policy has no memory."""
        return None

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Return the phases of a pre-training of `steps` gradient steps; theirs add up to it."""
        return (Phase("offline", steps),)

    def online(self) -> "Agent":
        """Return the agent for the online phase: all that changes at the switch happens here."""
        return self

    def advice(self, row: Mapping[str, Any]) -> str | None:
        """Return one line for the user if a row of metrics shows that the settings do not suit the data, else None."""
        return None

    @property
    def candidates(self) -> int:
        """Policies to try in the environment before the online phase; the best one goes online."""
        return 1

    def take_candidate(self, rank: Array) -> Self:
        """Return the agent with candidate `rank` `[]` acting and going online."""
        return self

    @property
    def updates_per_call(self) -> int:
        """Gradient steps that one online call of `update` is worth."""
        return self.config.online.utd_ratio

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> "Preset":
        """Return the settings for a family of tasks: the paper's, or small ones for a laptop."""
        raise NotImplementedError


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
    terminate_on_success: bool | None = None
    """Whether success ends an episode of a binary task in this agent's paper; `None`: as the task says."""
    data_share: float | None = None
    """Share of each dataset's first episodes that this agent's paper uses in a binary task; `None`: all."""
    normalize_returns: float | None = None
    """Distance of the dataset's best and worst return once rewards are scaled; `None` leaves them."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the run's settings that the method needs, such as `{"normalize": True}`."""
    tasks: Mapping[str, "Preset"] = field(default_factory=dict)
    """Other settings for tasks of the family, by words of a dataset's id (`pen human`); the first match counts."""

    def of_task(self, name: str) -> "Preset":
        """Return the preset of the first of `tasks` whose words stand in a row in a dataset's id, else this one."""
        words = f" {' '.join(re.findall('[a-z0-9]+', name.lower()))} "
        return next((preset for key, preset in self.tasks.items() if f" {key} " in words), self)
