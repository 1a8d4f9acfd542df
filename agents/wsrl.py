"""WSRL: warm-start reinforcement learning, fine-tuning without keeping the offline data.

"Efficient Online Reinforcement Learning Fine-Tuning Need Not Retain Offline Data", arXiv 2412.07762.
Idea: pre-train with Cal-QL (CQL where returns bound nothing), keep actor, critics, targets, temperature and their Adam
moments, roll the frozen policy out for 5000 steps into an empty buffer, then run plain SAC with ten LayerNorm critics
and four critic steps per environment step. The warm-up rows stand in for the data; nothing conservative is left online.

| what | paper | its code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| actor and temperature on critic steps | rest | Adam steps with gradients of zero | as the code | rest |
| samples of the temperature's entropy offline | - | 10, as many as the target's actions | 10 | 1 |
| the same online | - | 10 on mazes, else 1 | as the code | 1 |
| next actions of the target offline, online | 10; mazes 10, else 1 | the same | the same | 10; 1 |
| Adroit's failed demonstrations | left out | left out | left out | kept (`task.only_successes`) |
| rate of the actor | 1e-4 | 1e-4 | 1e-4 | 1e-4; small offline 1e-3 |

Without the zero-gradient steps (`finetune.zero_grad_steps`) actor and temperature move sqrt(5) times less at UTD 4.

The dip behind the switch is the method's: the actor follows critics that nothing holds down away from the data any
more. At equal settings and small sizes on data like Adroit's hammer (40 episodes, one seed each) the official code
(891ee35) fell from 38 % success to 0 after 1000 updates, ours from 45 % to 0, each from the other's networks as well;
neither was back after 10,000 steps. On `hand_dapg/door/noisy` the official code, from our networks, fell from
40 % to 0 and had 35 % after 6000 steps.

Where we differ
- The switch is an explicit call, `online()`, not a step counter.
- IQL (actor and critics) and BC (the actor only) may pre-train too; what is missing starts afresh. One that was
  trained elsewhere enters through `from_agent`; its networks are kept as they are, the limits of sigma included, where
  the code clips sigma to [1e-5, 10] whoever pre-trained (`log_std_range`).
- At UTD 1 actor and temperature step beside the critics, from the same parameters, as in the code.
- With `replay="mixed"` every minibatch has its share of dataset rows; the code's are purely one or the other.
- `pretrain="iql"`, an ablation of the paper, takes the actor's rate, critic widths and steps in sequence of this
  config; there it has 3e-4 throughout, V of 2x256, dropout 0.1 on Adroit and Kitchen, and steps from the same
  parameters.
- No preset for its robot variant (wsrl-robot: discount 0.98, batch 512, all rates 3e-4, temperature from 1e-2, tanh
  networks, std up to 5): set those fields; tanh is left out.
- Families without published settings: "pointmaze" follows AntMaze with smaller critics, "other" follows locomotion.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import struct

from o2o.agents.bc import BC, BCConfig
from o2o.agents.cql import CQL, CalQL, CQLConfig, family_settings, shrink_term
from o2o.agents.iql import IQL, IQLConfig
from o2o.agents.registry import register_agent
from o2o.agents.sac import RLPD, SAC, SACConfig, shrink_networks, shrink_online, with_rate
from o2o.errors import CheckpointError, ConfigError
from o2o.nn.modules import Model
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, Info, Needs, OnlineConfig, Params, Preset

Pretrain = Literal["calql", "cql", "iql", "bc", "sac"]
Learner = SAC | CQL | CalQL | IQL | BC
SOURCES = (SAC, RLPD, CQL, CalQL, IQL, BC)
"""What a WSRL agent can start from, and no class derived from them: their actors are policies of their own."""
PARTS = ("cql", "iql", "bc", "finetune")
"""Fields of `WSRLConfig` that are configs of agents."""
SHARED = (
    "actor_hidden_dims",
    "critic_hidden_dims",
    "num_critics",
    "actor_layer_norm",
    "critic_layer_norm",
    "shared_output",
    "std_mode",
    "log_std_range",
    "temperature_param",
)
"""Settings that must be equal before and after the switch, which carries networks and temperature over."""


def online_sac(**changes: Any) -> SACConfig:
    """Return WSRL's online SAC, that of the published code, with `changes`."""
    published: dict[str, Any] = {
        "actor_layer_norm": True,
        "critic_layer_norm": True,
        "init_scheme": "orthogonal",
        "last_gain": 1e-2,
        "shared_output": True,
        "log_std_range": None,
        "num_critics": 10,
        "target_subset": 2,
        "subset_replace": True,
        "backup_entropy": False,
        "temperature_param": "softplus",
        "temperature_objective": "alpha",
        "next_entropy_samples": 1,
        "joint_policy_step": True,
        "actor_lr": 1e-4,
        "temperature_lr": 1e-4,
    }
    return SACConfig(**{**published, **changes})


def fitting_iql(sac: SACConfig, **changes: Any) -> IQLConfig:
    """Return IQL whose actor and critics are those of `sac`, with `changes`."""
    networks: dict[str, Any] = {
        "actor_hidden_dims": sac.actor_hidden_dims,
        "critic_hidden_dims": sac.critic_hidden_dims,
        "value_hidden_dims": sac.critic_hidden_dims,
        "actor_layer_norm": sac.actor_layer_norm,
        "critic_layer_norm": sac.critic_layer_norm,
        "num_critics": sac.num_critics,
        "shared_output": sac.shared_output,
        "init_scheme": sac.init_scheme,
        "last_gain": sac.last_gain,
        "squash": True,
        "std_mode": sac.std_mode,
        "log_std_range": sac.log_std_range,
        "actor_lr": sac.actor_lr,
        "critic_lr": sac.critic_lr,
    }
    return IQLConfig(**{**networks, **changes})


def fitting_bc(sac: SACConfig, **changes: Any) -> BCConfig:
    """Return behaviour cloning whose actor is that of `sac`, with `changes`."""
    networks: dict[str, Any] = {
        "actor_hidden_dims": sac.actor_hidden_dims,
        "actor_layer_norm": sac.actor_layer_norm,
        "init_scheme": sac.init_scheme,
        "last_gain": sac.last_gain,
        "squash": True,
        "std_mode": sac.std_mode,
        "log_std_range": sac.log_std_range,
        "actor_lr": sac.actor_lr,
    }
    return BCConfig(**{**networks, **changes})


@dataclass(frozen=True)
class WSRLConfig(AgentConfig):
    """Settings of WSRL: a pre-trainer, the settings of each possible one, and the SAC that takes its networks over.

    `batch_size`, `discount` and `online` here hold for both phases; those inside the parts must not be set.
    """

    online: OnlineConfig = OnlineConfig(utd_ratio=4, warmup_steps=5000, min_rows=1024)
    """Schedule of the online phase."""
    pretrain: Pretrain = "calql"
    """Offline agent that the online phase starts from: `calql` or `cql` with the settings `cql`, `iql`, `bc`, or `sac`
    with the settings `finetune`."""
    cql: CQLConfig = CQLConfig()
    """The pre-trainer Cal-QL or CQL."""
    iql: IQLConfig = fitting_iql(online_sac())
    """The pre-trainer IQL."""
    bc: BCConfig = fitting_bc(online_sac())
    """The pre-trainer behaviour cloning."""
    finetune: SACConfig = online_sac()
    """SAC of the online phase."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, and for settings of a part that the whole decides."""
        super().__post_init__()
        for name in PARTS:
            part = getattr(self, name)
            for field in ("batch_size", "discount", "online"):
                inside, outside = getattr(part, field), getattr(self, field)
                if inside not in (outside, getattr(type(part), field)):
                    raise ConfigError(
                        f"WSRLConfig.{name}.{field} is {inside} and WSRLConfig.{field} is {outside}: the latter holds "
                        f"for both phases; set `config.{field}` and leave `config.{name}.{field}`"
                    )
        for field in ("critic_warmup", "actor_lr_warmup"):
            if getattr(self.cql, field) != getattr(CQLConfig, field):
                raise ConfigError(f"WSRLConfig.cql.{field} is of the online phase: set `config.finetune.{field}`")
        self.of_the_whole(self.finetune).check_switch("config.finetune.")

    @property
    def needs(self) -> Needs:
        """What an agent with these settings needs of its data and its run: of both phases."""
        return Needs(batch_keys=("mc_returns",)) if self.pretrain == "calql" else self.finetune.needs

    def pretrainer(self) -> tuple[type[Learner], Any]:
        """Return the pre-trainer's class and its config.

        Raises `ConfigError` where its networks differ from those of `finetune`.
        """
        kind, name = {
            "calql": (CalQL, "cql"),
            "cql": (CQL, "cql"),
            "iql": (IQL, "iql"),
            "bc": (BC, "bc"),
            "sac": (SAC, "finetune"),
        }[self.pretrain]
        part = getattr(self, name)
        for field in SHARED:
            have, want = getattr(part, field, None), getattr(self.finetune, field)
            if hasattr(part, field) and have != want:
                raise ConfigError(
                    f"WSRLConfig.{name}.{field} is {have} and WSRLConfig.finetune.{field} is {want}: make them equal, "
                    "the online phase takes the networks over"
                )
        return kind, self.of_the_whole(part)

    def of_the_whole(self, part: Any) -> Any:
        """Return the config of a part with the discount, batch size and schedule of the whole."""
        return replace(part, discount=self.discount, batch_size=self.batch_size, online=self.online)


@register_agent("wsrl")
class WSRL(Agent):
    r"""Warm-start RL: pre-trains with Cal-QL, warms up, then SAC without the dataset.

    `online()` makes the switch; `learner` is the agent at work.

    Equations (method, and the settings that enter):
    - `update` (`pretrain`, `cql.conservative.weight`): $\text{pre-training: } L_Q = \text{TD} + w\, g$
    - `online` (`online.replay`):
      $\text{switch: } \pi, Q_i, Q^-_i, \alpha \text{ and their moments are kept, the data are not}$
    - `sample_actions` (`online.warmup_steps`):
      $\text{warm-up: } K \text{ steps of } a \sim \pi \text{ into an empty buffer}$
    - `update` (`finetune.target_subset`, `online.utd_ratio`):
      $y = r + \gamma m \max_{a'} \min_{i \in S} Q^-_i(s', a')$
    """

    learner: Learner
    config: WSRLConfig = struct.field(pytree_node=False)

    @property
    def needs(self) -> Needs:
        """What the learner at work and the one online need: plain SAC nothing beyond transitions."""
        keys = (*self.learner.needs.batch_keys, *self.config.finetune.needs.batch_keys)
        return Needs(batch_keys=tuple(dict.fromkeys(keys)))

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: WSRLConfig = WSRLConfig()) -> Self:
        """Initialise the pre-trainer from a key and example observations `[B, D]` and actions `[B, A]`."""
        kind, settings = config.pretrainer()
        return cls(learner=kind.create(rng, observations, actions, settings), config=config)

    @classmethod
    def from_agent(cls, agent: "Learner | WSRL", config: WSRLConfig) -> Self:
        """Return the WSRL agent that starts from a pre-trained `agent`; its limits of sigma are those of `agent`.

        Raises ConfigError for agents of other classes and where the policy is not tanh-squashed, CheckpointError if
        shapes are not those of `config`.
        """
        source: Any = agent.learner if isinstance(agent, WSRL) else agent
        if type(source) not in SOURCES:
            known = ", ".join(kind.__name__ for kind in SOURCES)
            raise ConfigError(f"WSRL cannot start from {type(source).__name__}; expected {known} or WSRL")
        if isinstance(source, RLPD) and (source.config.chunk > 1 or source.config.activation != "relu"):
            raise ConfigError(
                "WSRL cannot start from an RLPD run with chunk above 1 or an activation other than relu; pre-train one "
                "with chunk 1 and relu"
            )
        limits = source.config.log_std_range
        parts = {name: replace(getattr(config, name), log_std_range=limits) for name in PARTS}
        if isinstance(source, SAC) and source.online_steps is not None:
            source = source.replace(online_steps=None)  # its online phase is over, this one begins anew
        switched = cls(learner=source, config=replace(config, **parts))
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

    def advice(self, row: Mapping[str, Any]) -> str | None:
        """Return the learner's advice."""
        return self.learner.advice(row)

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run the learner's update on leaves `[utd, B, ...]`."""
        learner, info = self.learner.update(batch)
        return self.replace(learner=learner), info

    def q_value(self, observations: Array, actions: Array) -> Array | None:
        """Return the learner's value `[...]` of actions `[..., A]`; None: it is behaviour cloning."""
        return self.learner.q_value(observations, actions)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1] for observations `[..., D]`."""
        return self.learner.sample_actions(observations, carry, rng, deterministic)

    def online(self) -> Self:
        """Return the agent whose learner is SAC with the pre-trained networks and Adam moments; the dual is dropped."""
        source, config = self.learner, self.config.of_the_whole(self.config.finetune)
        if type(source) is SAC and source.config == config:
            learner = source.online()
            return self if learner is source else self.replace(learner=learner)
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
                    f"WSRLConfig.finetune.temperature_param is {config.temperature_param!r}, the pre-trained agent has "
                    f"{source.config.temperature_param!r}: set it to that"
                )
            parts["temperature"] = _carry_over(source.temperature, fresh.temperature, "temperature")
        return self.replace(learner=fresh.replace(**parts, rng=rng).online())

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the paper's settings for a task family (arXiv 2412.07762); `small` for a laptop."""
        networks, term, steps, reward = family_settings(family)
        maze = family in ("antmaze", "pointmaze")
        expectile, beta = (0.9, 10.0) if maze else (0.7, 0.5 if family in ("adroit", "kitchen") else 3.0)
        finetune = online_sac(**networks, max_target_actions=10 if maze else None)
        config = WSRLConfig(
            pretrain="cql" if family in ("locomotion", "other") else "calql",
            cql=CQLConfig(**networks, conservative=term),
            iql=fitting_iql(finetune, expectile=expectile, beta=beta),
            bc=fitting_bc(finetune),
            finetune=finetune,
        )
        if size == "small":
            return Preset(_small(config, maze), 6_000 if maze else 8_000, 8_000, reward)
        config = replace(
            config,
            cql=replace(config.cql, next_entropy_samples=10),
            finetune=replace(finetune, zero_grad_steps=True),
        )
        return Preset(config, steps, 500_000, reward, only_successes=family == "adroit")


def _small(config: WSRLConfig, maze: bool) -> WSRLConfig:
    """Return the laptop form: fast rates offline; in mazes online too, elsewhere the paper's and a longer warm-up."""
    rate = 3e-4 if maze else 1e-3
    finetune = shrink_networks(with_rate(config.finetune, rate) if maze else config.finetune)
    iql = fitting_iql(
        finetune, expectile=config.iql.expectile, beta=config.iql.beta, actor_lr=rate, critic_lr=rate, value_lr=rate
    )
    online = shrink_online(config.online, utd_ratio=2 if maze else 4)
    online = replace(online, min_rows=256) if maze else replace(online, warmup_steps=3_000, min_rows=512)
    return replace(
        config,
        batch_size=128,
        online=online,
        cql=shrink_term(shrink_networks(with_rate(config.cql, rate))),
        iql=iql,
        bc=fitting_bc(finetune, actor_lr=rate),
        finetune=finetune,
    )


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
            "pre-train with the same network settings, or change WSRLConfig.finetune to match"
        )
    rest: Any = fresh.opt_state
    return fresh.replace(params=source.params, opt_state=(source.opt_state[0], *rest[1:]))


def _describe(shapes: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return ", ".join(f"{jax.tree_util.keystr(path[1:], simple=True, separator='/')} {shape}" for path, shape in leaves)
