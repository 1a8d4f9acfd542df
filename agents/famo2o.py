"""FamO2O over IQL: a family of policies, and a network that picks one of them for every state.

"Train Once, Get a Family: State-Adaptive Balances for Offline-to-Online Reinforcement Learning", arXiv 2310.17966.
Idea: one actor is conditioned on the coefficient beta of its own advantage weights, exp(beta * advantage), so it holds
policies from cautious to greedy; a balance network learns the beta whose action the critics value most. Offline the
actor is trained at betas from all of the range, online at those that the balance network draws. Critics, values and
data are IQL's (arXiv 2110.06169) and never see beta. Defaults follow the published code (LeapLabTHU/FamO2O, jax_iql).

| what | paper | its code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| weight of a row | exp(beta A) at its own beta | mean over the minibatch's betas | as the code | as the paper |
| mazes | - | betas 8 to 14, every update | the same | the same |
| locomotion | - | class default 1 to 5; a port: every 5th update | 1 to 5, every 5th | - |
| actor's rate | - | constant | constant | constant |

The released weights have shape `[B, B]` (`released_weights`): adv `[B]` times beta `[B, 1]`. The coefficients then only
choose what the policy sees, and every row counts the same at all of them. The paper's numbers presumably come from it.

Where we differ
- The two draws of the balance loss, the actor's betas and its dropout have keys of their own; the code shares some.
- Evaluation takes the actor's mean; the code samples with a standard deviation of 0. Its own environments are apart.
- A step that ends an episode by time limit and truly terminates as well is terminal (the code: truncated).
- As published: the action that the balance loss values is an unclipped sample, and log pi is that of x in (-1, 1), so
  the target entropy does not depend on the range. While the balance network is at least that random, nothing but the
  critics makes it less so: the temperature only falls.
- IQL's own options stay (dropout, squashed actor, simultaneous order, several critics); the Q loss averages over the
  critics where the code sums, the same step under Adam up to epsilon. The replay ring drops the oldest rows.
- Only the IQL form: with AWAC's advantage, Q(s, a) - Q(s, a'), the paper has a variant without published code.
- With `balance_every` above 1 the balance and its temperature step at every such update, the first one included.
- Presets: families without settings scale IQL's beta as locomotion does, by 1/3 and 5/3, under IQL's preset for the
  family, its dropout on Adroit included; so does small locomotion, whose beta is 0.5. "pointmaze" follows AntMaze.
  Small ones train the balance at 1e-3: the temperature starts at 1 and has to fall before states are told apart.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import struct

from o2o.agents.balance import BalanceConfig, FamilyActor, balance_info, coefficient, uniform_betas
from o2o.agents.iql import IQL, IQLConfig, build_actor, preset_settings
from o2o.agents.registry import register_agent
from o2o.agents.sac import positive, positive_model
from o2o.errors import ConfigError
from o2o.nn.kernels import branch
from o2o.nn.modules import Adam, GaussianActor, Model
from o2o.rl.losses import sac_actor_loss, temperature_loss
from o2o.settings import Between, Count, Range
from o2o.types import Array, Batch, Carry, Info, Params, Preset

LOG_STD_RANGE = (-10.0, 2.0)
"""Clip of the balance policy's log-std."""


@dataclass(frozen=True)
class FamO2OConfig(BalanceConfig, IQLConfig):
    """Settings of FamO2O over IQL; the defaults are AntMaze's."""

    beta: ClassVar[float] = math.nan  # pyright: ignore[reportIncompatibleVariableOverride]  # no field: balance_range
    expectile: Between = 0.9
    """Expectile of the value loss, in (0, 1); 0.5 is a plain mean."""
    balance_every: Count = 1
    """The balance network and its temperature step at every such update."""
    released_weights: bool = False
    """As the released code, whose weights broadcast to [B, B]: each row's weight is the mean of its weights at the
    coefficients of all rows of the minibatch, not the one at the row's own coefficient."""
    balance_target_entropy: Annotated[float, Range(below=math.log(2.0))] = -0.5
    """Entropy that the temperature holds the balance policy at; of x in (-1, 1), whose largest is ln 2."""


@register_agent("famo2o")
class FamO2O(IQL):
    r"""FamO2O over IQL: a family of policies; a network picks one for each state.

    Equations (method, and the settings that enter):
    - `actor_loss` (`weight_cap`, `released_weights`):
      $L_\pi = -\min(e^{\beta A(s, a)}, w) \log \pi(a \mid s, \beta),\quad A = Q^-(s, a) - V(s)$
    - `draw_betas` (`balance_range`):
      $\beta \sim U(\beta_0, \beta_1) \text{ offline, } \beta = b(x), x \sim \pi_b(\cdot \mid s) \text{ online}$
    - `balance_loss` (`balance_lr`, `balance_target_entropy`, `balance_every`):
      $L_b = \alpha \log \pi_b(x \mid s) - \min_i Q^-_i(s, a),\; a \sim \pi(\cdot \mid s, b(x))$
    """

    balance_actor: Model
    temperature: Model
    config: FamO2OConfig = struct.field(pytree_node=False)  # pyright: ignore[reportIncompatibleVariableOverride]
    fine_tuning: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: IQLConfig = FamO2OConfig()) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        if not isinstance(config, FamO2OConfig):
            raise ConfigError(f"FamO2O got a {type(config).__name__}; expected a FamO2OConfig")
        rng, actor_rng, balance_rng, temperature_rng = jax.random.split(rng, 4)
        base = IQL.create(rng, observations, actions, config)
        encoding = {"encoding_dim": config.encoding_dim, "encoding_base": config.encoding_base}
        actor = build_actor(actions.shape[-1], config, FamilyActor, **encoding)
        balance = GaussianActor(
            hidden_dims=config.balance_hidden_dims,
            action_dim=1,
            init_scheme=config.init_scheme,
            std_mode="uniform",
            log_std_min=LOG_STD_RANGE[0],
            log_std_max=LOG_STD_RANGE[1],
        )
        betas = jnp.zeros(observations.shape[:-1])
        agent = cls(
            actor=Model.create(actor_rng, actor, base.actor.optimizer, observations, betas),
            critic=base.critic,
            target_critic=base.target_critic,
            value=base.value,
            balance_actor=Model.create(balance_rng, balance, Adam(config.balance_lr), observations),
            temperature=positive_model(temperature_rng, 1.0, "exp", config.balance_lr),
            rng=base.rng,
            config=config,
        )
        return jax.tree.map(jnp.asarray, agent)

    def balance(self, observations: Array) -> Array:
        """Return the coefficient of every state, `[..., D]` to `[...]`, without randomness."""
        return coefficient(self.balance_actor(observations).mode()[..., 0], self.config.balance_range)

    def draw_betas(self, observations: Array, rng: Array) -> Array:
        """Draw the coefficients `[B]` that the actor is trained at: uniform offline, the balance policy's online."""
        ends = self.config.balance_range
        if not self.fine_tuning:
            return uniform_betas(rng, observations.shape[:-1], ends)
        return jax.lax.stop_gradient(coefficient(self.balance_actor(observations).sample(rng)[..., 0], ends))

    def actor_loss(self, params: Params, batch: Batch, value: Model, rng: Array) -> tuple[Array, Info]:
        """Return IQL's actor loss with every row's own coefficient, in its weight and in its policy, and metrics."""
        beta_rng, dropout_rng = jax.random.split(rng)
        beta = self.draw_betas(batch["observations"], beta_rng)
        dropout = {"dropout": dropout_rng}
        policy = self.actor(batch["observations"], beta, training=True, params=params, rngs=dropout)
        betas = beta[:, None] if self.config.released_weights else beta
        loss, info = self.weighted_cloning(policy, betas, batch, value)
        return loss, {**info, "actor/beta": beta.mean(), "actor/beta_std": beta.std()}

    def alpha(self, params: Params | None = None) -> Array:
        """Return the temperature of the balance policy's entropy, `[]`."""
        return positive(self.temperature(params=params), "exp")

    def balance_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return mean(t log pi(x|s) - min Q-bar(s, a)), a drawn at the beta of a drawn x, and metrics."""
        x_rng, action_rng = jax.random.split(rng)
        states, ends = batch["observations"], self.config.balance_range
        policy = self.balance_actor(states, params=params)
        x, log_prob = policy.sample_and_log_prob(x_rng)
        actions = self.actor(states, coefficient(x[..., 0], ends)).sample(action_rng)
        q = self.critic(states, actions, params=self.target_critic).min(axis=0)
        loss = sac_actor_loss(log_prob, q, self.alpha())
        info = balance_info(coefficient(policy.mode()[..., 0], ends), log_prob)
        return loss, {**info, "balance/loss": loss, "balance/q": q.mean(), "balance/alpha": self.alpha()}

    def balance_step(self, batch: Batch, rng: Array) -> tuple[Model, Model, Info]:
        """Return balance network and temperature after their step, where one is due, and metrics."""

        def learn() -> tuple[Model, Model, Info]:
            grads, info = jax.grad(self.balance_loss, has_aux=True)(self.balance_actor.params, batch, rng)
            entropy, target = info["balance/entropy"], self.config.balance_target_entropy
            loss = lambda params: temperature_loss(self.alpha(params), entropy, target)  # noqa: E731
            temperature = self.temperature.apply_gradients(jax.grad(loss)(self.temperature.params))
            return self.balance_actor.apply_gradients(grads), temperature, info

        def rest() -> tuple[Model, Model, Info]:
            _, info = self.balance_loss(self.balance_actor.params, batch, rng)
            return self.balance_actor, self.temperature, info

        if self.config.balance_every == 1:
            return learn()
        done: Any = self.value.opt_state[0]  # V steps at every update: Adam counts them
        return branch(done.count % self.config.balance_every == 0, learn, rest)

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        # Both steps read the parameters from before the update: the actor old betas, the balance the old actor.
        agent, info = super()._step(batch)
        rng, balance_rng = jax.random.split(agent.rng)
        balance_actor, temperature, balance = self.balance_step(batch, balance_rng)
        return agent.replace(balance_actor=balance_actor, temperature=temperature, rng=rng), {**info, **balance}

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]`, clipped to [-1, 1], at each state's `balance`, and the unused carry."""
        policy = self.actor(observations, self.balance(observations))
        return jnp.clip(policy.mode() if deterministic else policy.sample(rng), -1.0, 1.0), carry

    def online(self) -> Self:
        """Return the agent whose actor is trained at the balance policy's coefficients, at a constant rate."""
        return super().online().replace(fine_tuning=True)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks: IQL's, with a range around its beta and a balance network."""
        settings, rest = preset_settings(family, size)
        beta = settings.pop("beta")
        maze = family in ("antmaze", "pointmaze")
        low, high = (0.8, 1.4) if maze else (1 / 3, 5 / 3)
        published = family == "locomotion" and size == "paper"
        config = FamO2OConfig(
            **settings,
            balance_range=(low * beta, high * beta),
            balance_hidden_dims=settings["actor_hidden_dims"],
            balance_lr=1e-3 if size == "small" else 3e-4,
            balance_every=5 if published else 1,
            released_weights=size == "paper",
        )
        return Preset(config, **rest)
