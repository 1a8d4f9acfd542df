"""WSRL: warm-start reinforcement learning, fine-tuning without keeping the offline data.

"Efficient Online Reinforcement Learning Fine-Tuning Need Not Retain Offline Data", arXiv 2412.07762.
Idea: pre-train with Cal-QL (CQL where returns bound nothing), keep actor, critics, targets, temperature and their Adam
moments, roll the frozen policy out for 5000 steps into an empty buffer, then run plain SAC with ten LayerNorm critics
and four critic steps per environment step. The warm-up rows stand in for the data; nothing conservative is left online.

Where we differ
- An optimiser moves only when its loss ran; `zero_grad_steps` restores the code's zero-gradient steps.
- The switch is an explicit call, `online()`, not a step counter.
- IQL (actor and critics) and BC (the actor only) may pre-train too; what is missing starts afresh. One that was
  trained elsewhere enters through `from_agent`; its networks are kept as they are, the limits of sigma included, where
  the code clips sigma to [1e-5, 10] whoever pre-trained (`log_std_range`).
- At UTD 1 actor and temperature step beside the critics, from the same parameters (`joint_single`, as in the code).
- With `replay="mixed"` every minibatch has its share of dataset rows; the code's are purely one or the other.
- Adroit's failed demonstrations are left out as in the paper; the small preset keeps them (`task.only_successes`).
- `max_target_actions` acts online (mazes only, as in the paper), `pretrain_target_actions` offline.
- `pretrain="iql"`, an ablation of the paper, takes this config's rates, critic widths and steps in sequence; there it
  has 3e-4 throughout, V of 2x256, dropout 0.1 on Adroit and Kitchen, and steps from the same parameters.
- The small presets, mazes apart, pre-train at a rate of their own, `pretrain_lr`; the paper has one rate throughout.
- Families without published settings: "pointmaze" follows AntMaze with smaller critics, "other" follows locomotion.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import struct

from o2o.agents.bc import BC, BCConfig
from o2o.agents.cql import CQL, CalQL, CalQLConfig, CQLConfig, family_settings, shrink_conservative
from o2o.agents.iql import IQL, IQLConfig
from o2o.agents.minibatches import check_counts
from o2o.agents.sac import RLPD, SAC, SACConfig
from o2o.errors import CheckpointError, ConfigError
from o2o.nn.modules import Model
from o2o.types import Agent, Array, Batch, Carry, Info, Needs, OnlineConfig, Params, Preset

Pretrain = Literal["calql", "cql", "iql", "bc", "sac"]
Learner = SAC | CQL | CalQL | IQL | BC
SOURCES = (SAC, RLPD, CQL, CalQL, IQL, BC)
"""What a WSRL agent can start from, and no class derived from them: their actors are policies of their own."""


@dataclass(frozen=True)
class WSRLConfig(CQLConfig):
    """Settings of WSRL: those of the online SAC, and those of the pre-trainer whose networks it takes over."""

    online: OnlineConfig = OnlineConfig(utd_ratio=4, warmup_steps=5000, min_rows=1024)
    """Schedule of the online phase."""
    max_target_actions: int | None = None
    """Next actions of which the online target takes the best; `None` for a single one."""
    pretrain: Pretrain = "calql"
    """Offline agent that the online phase starts from."""
    pretrain_target_actions: int | None = 10
    """Next actions of which the target of CQL and Cal-QL takes the best while pre-training."""
    expectile: float = 0.7
    """IQL as pre-trainer: expectile of the value loss."""
    beta: float = 3.0
    """IQL as pre-trainer: inverse temperature of the advantage weights."""
    pretrain_lr: float | None = None
    """One rate for all networks while pre-training; `None`, as in the paper, for the same rates as online."""

    def __post_init__(self) -> None:
        """Check the pre-trainer's name and the settings that contradict each other."""
        super().__post_init__()
        check_counts(self, "pretrain_target_actions")
        if self.pretrain not in ("calql", "cql", "iql", "bc", "sac"):
            raise ConfigError(f"WSRLConfig.pretrain is {self.pretrain!r}; expected calql, cql, iql, bc or sac")

    @property
    def needs(self) -> Needs:
        """What an agent with these settings needs of its data and its run."""
        return pretrainer(self)[1].needs


class WSRL(Agent):
    """An offline agent that becomes SAC at `online()`; `learner` is the one at work."""

    learner: Learner
    config: WSRLConfig = struct.field(pytree_node=False)

    @property
    def needs(self) -> Needs:
        """What the learner at work needs: online, plain SAC, nothing beyond transitions."""
        return Needs() if type(self.learner) is SAC else self.learner.needs

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: WSRLConfig = WSRLConfig()) -> Self:
        """Initialise the pre-trainer from a key and example observations `[B, D]` and actions `[B, A]`."""
        kind, pretrain_config = pretrainer(config)
        return cls(learner=kind.create(rng, observations, actions, pretrain_config), config=config)

    @classmethod
    def from_agent(cls, agent: "Learner | WSRL", config: WSRLConfig) -> Self:
        """Return the WSRL agent that starts from a pre-trained `agent`; its `log_std_range` is that of `agent`.

        Raises ConfigError for agents of other classes and where the policy is not tanh-squashed, CheckpointError if
        shapes are not those of `config`.
        """
        source = agent.learner if isinstance(agent, WSRL) else agent
        if type(source) not in SOURCES:
            known = ", ".join(kind.__name__ for kind in SOURCES)
            raise ConfigError(f"WSRL cannot start from {type(source).__name__}; expected {known} or WSRL")
        switched = cls(learner=source, config=replace(config, log_std_range=source.config.log_std_range))
        jax.eval_shape(switched.online)
        return switched

    @property
    def actor(self) -> Model:
        """The learner's actor."""
        return self.learner.actor

    @property
    def critic(self) -> Model:
        """The learner's critics; BC has none."""
        return _part(self.learner, "critic")

    @property
    def target_critic(self) -> Params:
        """The learner's target critics; BC has none."""
        return _part(self.learner, "target_critic")

    @property
    def temperature(self) -> Model:
        """The learner's temperature; BC and IQL have none."""
        return _part(self.learner, "temperature")

    @property
    def rng(self) -> Array:
        """The learner's key."""
        return self.learner.rng

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run the learner's update on leaves `[utd, B, ...]`."""
        learner, info = self.learner.update(batch)
        return self.replace(learner=learner), info

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1] for observations `[..., D]`."""
        return self.learner.sample_actions(observations, carry, rng, deterministic)

    def online(self) -> Self:
        """Return the agent whose learner is SAC with the pre-trained networks and Adam moments; the dual is dropped."""
        source, config = self.learner, self.config
        if type(source) is SAC and source.config == config:
            return self
        if not source.actor.module.squash:
            raise ConfigError(
                f"WSRL got a {type(source).__name__} whose policy is not tanh-squashed; pre-train it with squash=True"
            )
        observation_dim, action_dim = input_dims(source.actor)
        rng, fresh_rng = jax.random.split(source.rng)
        fresh = SAC.create(fresh_rng, jnp.zeros((1, observation_dim)), jnp.zeros((1, action_dim)), config)
        parts: dict[str, Any] = {"actor": _carry_over(source.actor, fresh.actor, "actor")}
        if not isinstance(source, BC):
            parts["critic"] = _carry_over(source.critic, fresh.critic, "critic")
            parts["target_critic"] = source.target_critic
        if isinstance(source, SAC):
            if source.config.temperature_param != config.temperature_param:
                raise ConfigError(
                    f"temperature_param is {config.temperature_param!r} but the pre-trained agent has "
                    f"{source.config.temperature_param!r}; set it to that"
                )
            parts["temperature"] = _carry_over(source.temperature, fresh.temperature, "temperature")
        return self.replace(learner=fresh.replace(**parts, rng=rng))

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the paper's settings for a task family (arXiv 2412.07762); `small` for a laptop."""
        networks, term, steps, reward = family_settings(family)
        pretrain: Pretrain = "cql" if family in ("locomotion", "other") else "calql"
        maze = family in ("antmaze", "pointmaze")
        expectile, beta = (0.9, 10.0) if maze else (0.7, 0.5 if family in ("adroit", "kitchen") else 3.0)
        config = WSRLConfig(
            **networks, conservative=term, pretrain=pretrain, max_target_actions=10 if maze else None,
            expectile=expectile, beta=beta,
        )  # fmt: skip
        if size == "small":
            return Preset(_small(config, maze), 6_000 if maze else 8_000, 8_000, reward)
        return Preset(config, steps, 500_000, reward, only_successes=family == "adroit")


def _small(config: WSRLConfig, maze: bool) -> WSRLConfig:
    """Return the laptop form: fast rates offline; in mazes online too, elsewhere the paper's and a longer warm-up."""
    small = replace(shrink_conservative(config, utd_ratio=2 if maze else 4), pretrain_target_actions=4)
    if maze:
        rates = {"actor_lr": 3e-4, "critic_lr": 3e-4, "temperature_lr": 3e-4}
        return replace(small, **rates, online=replace(small.online, min_rows=256))
    rates = {"actor_lr": config.actor_lr, "critic_lr": config.critic_lr, "temperature_lr": config.temperature_lr}
    online = replace(small.online, warmup_steps=3_000, min_rows=512)
    return replace(small, **rates, pretrain_lr=1e-3, online=online)


def pretrainer(config: WSRLConfig) -> tuple[type, Any]:
    """Return the pre-trainer's class and its config, whose networks are those of the online phase."""
    if config.pretrain in ("calql", "cql"):
        settings = _values(config, CQLConfig, max_target_actions=config.pretrain_target_actions)
        return (CalQL, CalQLConfig(**settings)) if config.pretrain == "calql" else (CQL, CQLConfig(**settings))
    if config.pretrain == "sac":
        return SAC, SACConfig(**_values(config, SACConfig))
    if config.pretrain == "bc":
        return BC, BCConfig(**_values(config, BCConfig, squash=True))
    return IQL, IQLConfig(**_values(config, IQLConfig, squash=True, value_hidden_dims=config.critic_hidden_dims))


def _values(config: WSRLConfig, kind: type, **overrides: Any) -> dict[str, Any]:
    """Return the settings that `config` and the config class `kind` have in common, with `overrides`."""
    names = {field.name for field in fields(kind)} & {field.name for field in fields(config)}
    if config.pretrain_lr is not None:
        rates = {"actor_lr", "critic_lr", "value_lr", "temperature_lr"} & {field.name for field in fields(kind)}
        overrides = {**dict.fromkeys(rates, config.pretrain_lr), **overrides}
    return {**{name: getattr(config, name) for name in sorted(names)}, **overrides}


def _part(learner: Learner, name: str) -> Any:
    if not hasattr(learner, name):
        raise ConfigError(f"{type(learner).__name__} has no {name}; WSRL has one after online()")
    return getattr(learner, name)


def input_dims(actor: Model) -> tuple[int, int]:
    """Return the sizes (D, A) of a `GaussianActor`'s observations and actions."""
    return actor.params["params"]["MLP_0"]["Dense_0"]["kernel"].shape[-2], actor.module.action_dim


def _carry_over(source: Model, fresh: Model, name: str) -> Model:
    """Return `fresh`, whose network computes the same, with the parameters and moments of `source`."""
    want, have = (jax.tree.map(jnp.shape, model.params) for model in (fresh, source))
    if want != have:
        raise CheckpointError(
            f"WSRL's {name} does not fit the pre-trained one: expected {_describe(want)}, found {_describe(have)}; "
            "pre-train with the same network settings, or change WSRLConfig to match"
        )
    rest: Any = fresh.opt_state
    return fresh.replace(params=source.params, opt_state=(source.opt_state[0], *rest[1:]))


def _describe(shapes: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return ", ".join(f"{jax.tree_util.keystr(path[1:], simple=True, separator='/')} {shape}" for path, shape in leaves)
