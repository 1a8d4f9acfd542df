"""IQL: implicit Q-learning (arXiv 2110.06169).

An expectile regression makes V an upper expectile of Q over the actions of the data, Q bootstraps from V, and the
actor is cloned with weights exp(beta * advantage): no action outside the batch is ever evaluated. Defaults follow the
published code (ikostrikov/implicit_q_learning); options give WSRL's variant.

| what | paper | its code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| actor's rate | cosine to 0 offline | cosine offline, constant online | locomotion: cosine over 1M | constant |
| locomotion | 1M updates, returns 1000 apart | the same | the same, 1M steps online | raw rewards |
| mazes | r - 1, 1M + 1M | the same | the same | raw rewards |
| Adroit, Kitchen | raw rewards, 1M updates | the same | WSRL's runs: x10 + 5, -4; 20k, 250k | raw rewards |
| order of the steps | - | V, actor, Q | V, actor, Q | V, actor, Q (WSRL: simultaneous) |

The decay is over a fixed number of updates, `actor_decay_steps`: set it to the run's where `--offline-steps` differs.

Where we differ
- The Q loss averages over the critics where the published code sums: the same step under Adam, up to epsilon.
- One `init_scheme` serves all layers; WSRL's IQL has Xavier trunks, orthogonal heads, an actor's last layer of 1e-2.
- Presets leave Adroit's failed demonstrations out, as WSRL's runs (the small preset keeps them). No normalisation of
  observations, no exploration noise beyond the policy's own; Adroit and Kitchen have 500k steps online (published: 1M).
  "pointmaze" follows AntMaze. Small locomotion has its own rates, tau and beta.
- The online buffer is a ring: once the run's replay capacity is full, the oldest rows, the dataset's, go first.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.agents.registry import register_agent
from o2o.nn.distributions import Normal, TanhNormal
from o2o.nn.modules import Adam, CriticEnsemble, GaussianActor, Init, Model, Value
from o2o.rl.losses import advantage_weights, critic_loss, expectile_loss, td_target
from o2o.settings import AboveZero, Average, Between, Count, Dropout, Interval, NotNegative, Rate, Widths
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, Info, OnlineConfig, Params, Preset

ACTION_LIMIT = 1.0 - 1e-5
"""Actions of the data are clipped to this before a squashed actor's log-density, which is infinite at 1."""


@dataclass(frozen=True)
class IQLConfig(AgentConfig):
    """Settings of IQL."""

    expectile: Between = 0.7
    """Expectile of the value loss, in (0, 1); 0.5 is a plain mean."""
    beta: NotNegative = 3.0
    """Inverse temperature of the advantage weights; 0 is behaviour cloning."""
    weight_cap: AboveZero = 100.0
    """Largest advantage weight."""
    update_order: Literal["sequential", "simultaneous"] = "sequential"
    """`sequential`: V first, then actor and Q with the new V (published code); `simultaneous`: all from the old
    parameters (WSRL's code)."""
    actor_hidden_dims: Widths = (256, 256)
    """Widths of the actor's hidden layers."""
    critic_hidden_dims: Widths = (256, 256)
    """Widths of the critics' hidden layers."""
    value_hidden_dims: Widths = (256, 256)
    """Widths of the value network's hidden layers."""
    actor_layer_norm: bool = False
    """LayerNorm in the actor (WSRL's actor has it)."""
    critic_layer_norm: bool = False
    """LayerNorm in the critics (WSRL's critics have it)."""
    value_layer_norm: bool = False
    """LayerNorm in V (no published setting; `benchmarks/iql_form.py` tries it)."""
    num_critics: Count = 2
    """Ensemble size; the advantage uses the minimum over all targets."""
    shared_output: bool = False
    """One output layer for all critics, as in WSRL's code."""
    init_scheme: Init = "orthogonal"
    """Initialiser of every kernel."""
    last_gain: NotNegative | None = None
    """Orthogonal gain of the last hidden layer of actor and critics; `None` for sqrt(2)."""
    dropout: Dropout = 0.0
    """Dropout in the actor's hidden layers, active in the actor's loss only."""
    squash: bool = False
    """Tanh-squashed Gaussian actor, needed where WSRL or SAC starts from it; otherwise a plain Gaussian."""
    tanh_mean: bool = True
    """Tanh on the mean of the plain Gaussian; ignored with `squash`."""
    std_mode: Literal["exp", "uniform"] = "uniform"
    """`uniform`: one free log-std per action dimension; `exp`: a linear head of the state."""
    log_std_range: Interval | None = (-5.0, 2.0)
    """Clip of the log-std; `None` clips the std itself to [1e-5, 10]."""
    actor_lr: Rate = 3e-4
    """Adam rate of the actor."""
    critic_lr: Rate = 3e-4
    """Adam rate of the critics."""
    value_lr: Rate = 3e-4
    """Adam rate of the value network."""
    actor_decay_steps: Count | None = None
    """Cosine decay of the actor's rate to 0 over this many updates, offline only; `None` for a constant rate."""
    tau: Average = 0.005
    """Weight of the new parameters in the target critics' average, after every update."""
    online: OnlineConfig = OnlineConfig(utd_ratio=1, replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step."""


_DEFAULT = IQLConfig()
Actor = TypeVar("Actor", bound=GaussianActor)


def build_actor(action_dim: int, config: IQLConfig, kind: type[Actor] = GaussianActor, **extra: Any) -> Actor:
    """Return the definition of an actor for actions `[A]`, of class `kind` with the fields `extra` of its own."""
    low, high = config.log_std_range or (None, None)
    return kind(
        hidden_dims=config.actor_hidden_dims,
        action_dim=action_dim,
        layer_norm=config.actor_layer_norm,
        dropout=config.dropout,
        init_scheme=config.init_scheme,
        last_gain=config.last_gain,
        std_mode=config.std_mode,
        log_std_min=low,
        log_std_max=high,
        squash=config.squash,
        tanh_mean=config.tanh_mean and not config.squash,
        **extra,
    )


@register_agent("iql")
class IQL(Agent):
    r"""Implicit Q-learning: never asks Q about actions outside the data.

    Equations (method, and the settings that enter):
    - `value_loss` (`expectile`): $u = \min_i Q^-_i(s, a) - V(s),\quad L_V = \lvert \tau - 1_{u < 0} \rvert\, u^2$
    - `q_loss` (`discount`, `tau`): $y = r + \gamma m V(s'),\quad L_Q = \frac{1}{E} \sum_i (Q_i(s, a) - y)^2$
    - `actor_loss` (`beta`, `weight_cap`): $L_\pi = -\min(e^{\beta u}, w) \log \pi(a \mid s)$
    """

    actor: Model
    critic: Model
    target_critic: Params
    value: Model
    rng: Array
    config: IQLConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: IQLConfig = _DEFAULT) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        check_flat(observations, "IQL")
        rng, actor_rng, critic_rng, value_rng = jax.random.split(rng, 4)
        actor = build_actor(actions.shape[-1], config)
        critic = CriticEnsemble(
            config.critic_hidden_dims,
            config.num_critics,
            layer_norm=config.critic_layer_norm,
            init_scheme=config.init_scheme,
            last_gain=config.last_gain,
            shared_output=config.shared_output,
        )
        value = Value(config.value_hidden_dims, config.value_layer_norm, config.init_scheme)
        critic_model = Model.create(critic_rng, critic, Adam(config.critic_lr), observations, actions)
        agent = cls(
            actor=Model.create(actor_rng, actor, Adam(config.actor_lr, config.actor_decay_steps), observations),
            critic=critic_model,
            target_critic=jax.tree.map(jnp.copy, critic_model.params),
            value=Model.create(value_rng, value, Adam(config.value_lr), observations),
            rng=rng,
            config=config,
        )
        return jax.tree.map(jnp.asarray, agent)

    def value_loss(self, params: Params, batch: Batch) -> tuple[Array, Info]:
        """Return the expectile loss of min Q-bar(s, a) - V(s) on a minibatch, and metrics."""
        target = self.critic(batch["observations"], batch["actions"], params=self.target_critic).min(axis=0)
        v = self.value(batch["observations"], params=params)
        loss = expectile_loss(jax.lax.stop_gradient(target) - v, self.config.expectile)
        return loss, {"value/loss": loss, "value/v": v.mean()}

    def actor_loss(self, params: Params, batch: Batch, value: Model, rng: Array) -> tuple[Array, Info]:
        """Return the negative log-likelihood of the batch's actions weighted by their advantages, and metrics."""
        policy = self.actor(batch["observations"], training=True, params=params, rngs={"dropout": rng})
        return self.weighted_cloning(policy, self.config.beta, batch, value)

    def weighted_cloning(
        self, policy: Normal | TanhNormal, beta: float | Array, batch: Batch, value: Model
    ) -> tuple[Array, Info]:
        """Return the actor's loss for its distribution at the batch's states and `beta`, and metrics.

        `beta` is one number, `[B]` for the rows, or `[K, 1]`: then a row's weight is the mean of those at K numbers.
        """
        config, actions = self.config, batch["actions"]
        q = self.critic(batch["observations"], actions, params=self.target_critic).min(axis=0)
        advantages = jax.lax.stop_gradient(q - value(batch["observations"]))
        weights = jnp.atleast_2d(advantage_weights(advantages, beta, config.weight_cap)).mean(axis=0)
        if config.squash:
            actions = jnp.clip(actions, -ACTION_LIMIT, ACTION_LIMIT)
        log_prob = policy.log_prob(actions)
        loss = -jnp.mean(weights * log_prob)
        return loss, {
            "actor/loss": loss,
            "actor/log_prob": log_prob.mean(),
            "actor/advantage": advantages.mean(),
            "actor/weight": weights.mean(),
            "actor/capped": jnp.mean(beta * advantages >= jnp.log(config.weight_cap)),
            "actor/std": policy.std.mean(),
        }

    def q_loss(self, params: Params, batch: Batch, value: Model) -> tuple[Array, Info]:
        """Return the mean squared error of all critics to r + discount * m * V(s') with `value`, and metrics."""
        next_v = value(batch["next_observations"])
        targets = td_target(batch["rewards"], batch["masks"], next_v, self.config.discount)
        q = self.critic(batch["observations"], batch["actions"], params=params)
        loss = critic_loss(q, targets)
        return loss, {"critic/loss": loss, "critic/q": q.mean(), "critic/target": targets.mean()}

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        rng, dropout_rng = jax.random.split(self.rng)
        grads, value_info = jax.grad(self.value_loss, has_aux=True)(self.value.params, batch)
        new_value = self.value.apply_gradients(grads)
        value = new_value if self.config.update_order == "sequential" else self.value
        actor_grads, actor_info = jax.grad(self.actor_loss, has_aux=True)(self.actor.params, batch, value, dropout_rng)
        critic_grads, critic_info = jax.grad(self.q_loss, has_aux=True)(self.critic.params, batch, value)
        critic = self.critic.apply_gradients(critic_grads)
        agent = self.replace(
            actor=self.actor.apply_gradients(actor_grads),
            critic=critic,
            target_critic=optax.incremental_update(critic.params, self.target_critic, self.config.tau),
            value=new_value,
            rng=rng,
        )
        return agent, {**value_info, **actor_info, **critic_info}

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run one whole IQL update per leading row of the leaves `[utd, B, ...]`; metrics are means over them."""
        return each_minibatch(lambda agent, rows: agent._step(rows), self, batch)

    def q_value(self, observations: Array, actions: Array) -> Array:
        """Return the least critic's value `[...]` of actions `[..., A]` at observations `[..., D]`."""
        return self.critic(observations, actions).min(axis=0)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]`, clipped to [-1, 1], and the unused carry."""
        dist = self.actor(observations)
        actions = dist.mode() if deterministic else dist.sample(rng)
        return jnp.clip(actions, -1.0, 1.0), carry

    def online(self) -> Self:
        """Return the agent with the actor's rate constant: the same losses, moments kept, decay off."""
        if self.actor.optimizer.decay_steps is None:
            return self
        optimizer = Adam(self.config.actor_lr)
        fresh: Any = optimizer.build().init(self.actor.params)
        opt_state = (self.actor.opt_state[0], *fresh[1:])  # Adam's moments, without the schedule's count
        return self.replace(actor=self.actor.replace(optimizer=optimizer, opt_state=opt_state))

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks (arXiv 2110.06169; zhouzypaul/wsrl).

        `paper`: nets 2x256; offline 1M updates on mazes and locomotion (the paper), 20k on Adroit, 250k on Kitchen,
        with the rewards of WSRL's runs (Adroit 10 x -1/0 + 5, Kitchen -4) but the published code's on mazes (r - 1) and
        locomotion (returns 1000 apart), which beta was tuned for. On locomotion the actor's rate falls to 0 offline.
        `small`: 2x128 (Adroit 2x256), 10k updates and 10k environment steps. Locomotion at rates of 1e-3, tau 0.01
        and beta 0.5: in so few updates V is far from its end and advantages are mostly its error, which beta 3 clones.
        """
        settings, rest = preset_settings(family, size)
        decay = rest["offline_steps"] if size == "paper" and family == "locomotion" else None
        return Preset(IQLConfig(**settings, actor_decay_steps=decay), **rest)


def preset_settings(family: str, size: Literal["paper", "small"]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of IQL's config, and the other fields of its `Preset`, for a family of tasks.

    Methods that are IQL at heart (FamO2O, PEX, JSRL) begin their presets with these.
    """
    expectile, beta, dropout, offline, online, reward = {
        "antmaze": (0.9, 10.0, 0.0, 1_000_000, 1_000_000, (1.0, -1.0)),
        "pointmaze": (0.9, 10.0, 0.0, 1_000_000, 1_000_000, (1.0, -1.0)),
        "adroit": (0.7, 0.5, 0.1, 20_000, 500_000, (10.0, 5.0)),
        "kitchen": (0.7, 0.5, 0.1, 250_000, 500_000, (1.0, -4.0)),
        "locomotion": (0.7, 3.0, 0.0, 1_000_000, 1_000_000, None),
    }.get(family, (0.7, 3.0, 0.0, 1_000_000, 1_000_000, None))
    width, batch_size = 256, 256
    if size == "small":
        offline, online = 10_000, 10_000
        width, batch_size = (256, 256) if family == "adroit" else (128, 128)
    quick = size == "small" and family == "locomotion"
    rate, tau, beta = (1e-3, 0.01, 0.5) if quick else (3e-4, 0.005, beta)
    settings = {
        "expectile": expectile,
        "beta": beta,
        "dropout": dropout,
        "actor_hidden_dims": (width, width),
        "critic_hidden_dims": (width, width),
        "value_hidden_dims": (width, width),
        "actor_lr": rate,
        "critic_lr": rate,
        "value_lr": rate,
        "tau": tau,
        "batch_size": batch_size,
    }
    rest = {
        "offline_steps": offline,
        "online_steps": online,
        "reward": reward,
        "only_successes": size == "paper" and family == "adroit",  # as in WSRL's runs
        "normalize_returns": 1000.0 if family == "locomotion" else None,
    }
    return settings, rest
