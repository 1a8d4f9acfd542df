"""FamO2O over CQL: a family of conservative policies, and a network that picks one of them for every state.

"Train Once, Get a Family: State-Adaptive Balances for Offline-to-Online Reinforcement Learning", arXiv 2310.17966.
Idea: one actor is conditioned on the coefficient beta that multiplies Q in its own loss, alpha log pi - beta Q; a
balance network learns the beta whose action the critics value most. Offline the actor is trained at betas from all of
the range, online at those that the balance network draws. Critics and their conservative term are CQL's (arXiv
2006.04779), which stays on online. Defaults follow the published code (LeapLabTHU/FamO2O, jax_cql).

| what | paper | its code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| balance network's range | (lo, hi) | (2 lo - hi, hi) | as the code: (-0.5, 1.5) | (0.5, 1.5) |
| uniform betas offline | (lo, hi) | (lo, hi) | (0.5, 1.5) | (0.5, 1.5) |
| target's action at the beta of | the next state | the present state | the present state | the next state |
| offline, online | - | 2M updates, 1M steps | the same on locomotion | - |

A negative coefficient lowers Q (`released_range`). In target and gap the beta is the balance network's, offline too.

Where we differ
- The balance loss draws its own x and action, in both phases; online the code takes those of the actor's loss. Every
  draw has its own key.
- Kernels are orthogonal, hidden layers with gain sqrt(2) where the code's are LeCun normal, output layers with 0.1,
  which gives them the norm of its uniform initialiser of variance 0.01 / fan-in.
- TD loss and gap are means over the critics, not sums: the same step under Adam up to epsilon.
- All losses are of the same parameters at UTD 1, as in the code; above, the policies follow the critics (see CQL).
- One update after every environment step, not 1000 after every 1000; dataset actions are clipped to 0.99999 (0.999).
- Presets: only locomotion has published settings. Others take CQL's own conservative term, rewards and steps for the
  family with these networks and this range.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import struct

from o2o.agents.balance import BalanceConfig, Ends, FamilyActor, balance_info, coefficient, uniform_betas
from o2o.agents.cql import CQL, Conservative, CQLConfig, family_settings, shrink_term
from o2o.agents.registry import register_agent
from o2o.agents.sac import Positive, SACConfig, build_actor, shrink
from o2o.errors import ConfigError
from o2o.nn.distributions import TanhNormal
from o2o.nn.modules import Adam, Init, Model
from o2o.settings import AboveZero, Count, Interval, NotNegative, Rate
from o2o.types import Array, Batch, Carry, Info, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class FamO2OCQLConfig(BalanceConfig, CQLConfig):
    """Settings of FamO2O over CQL; the defaults are those of locomotion."""

    balance_range: Ends = (0.5, 1.5)
    """Smallest and largest coefficient; equal ones make a constant balance."""
    released_range: bool = False
    """As the released code: the balance network's coefficients are x (hi - lo) + lo, x in (-1, 1)."""
    target_beta: Literal["next", "current"] = "next"
    """State whose coefficient the next action is drawn at: `next`, or `current` as in the released code."""
    online: OnlineConfig = OnlineConfig(replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step."""
    actor_layer_norm: bool = False
    """LayerNorm after each hidden layer of actor and balance network."""
    last_gain: NotNegative | None = None
    """Orthogonal gain of the last hidden layer of actor and critics; `None` for sqrt(2)."""
    init_scheme: Init = "orthogonal"
    """Initialiser of every kernel."""
    output_gain: AboveZero = 0.1
    """Orthogonal gain of the critics' output layer."""
    policy_output_gain: AboveZero = 0.1
    """Orthogonal gain of the output layers of actor and balance network."""
    shared_output: bool = False
    """One output layer for all critics instead of one each."""
    std_mode: Literal["exp", "scaled", "uniform"] = "scaled"
    """`exp`: log-std is a head of the state; `scaled`: with a learned scale and offset; `uniform`: one free vector."""
    log_std_range: Interval | None = (-20.0, 2.0)
    """Clip of the log-std; `None` clips the std itself to [1e-5, 10]."""
    num_critics: Count = 2
    """Members of the critic ensemble."""
    target_subset: Count | None = None
    """Target members drawn for each minibatch, whose minimum is the target; `None` for all."""
    max_target_actions: Count | None = None
    """Next actions of which the target takes the best; `None` for a single one."""
    temperature_param: Positive = "exp"
    """How alpha is made from its free parameter."""
    temperature_objective: Literal["alpha", "log_alpha"] = "log_alpha"
    """Whether the temperature loss multiplies the entropy gap by alpha or by its logarithm (needs `exp`)."""
    next_entropy_samples: Count | None = None
    """The temperature sees the entropy of this many samples at each next state; `None`: that of the actor's loss."""
    actor_lr: Rate = 3e-4
    """Adam's rate of the actor."""
    temperature_lr: Rate = 3e-4
    """Adam's rate of the temperature."""
    conservative: Conservative = Conservative(weight=1.0, subset=None)
    """The conservative term."""

    @property
    def reach(self) -> Ends:
        """Smallest and largest coefficient that the balance network can choose."""
        low, high = self.balance_range
        return (2.0 * low - high, high) if self.released_range else (low, high)


@register_agent("famo2o_cql")
class FamO2OCQL(CQL):
    r"""FamO2O over CQL: a family of policies; a network picks one for each state.

    Equations (method, and the settings that enter):
    - `policy_value` (`balance_range`):
      $L_\pi = \alpha \log \pi(\tilde a \mid s, \beta) - \beta \min_i Q_i(s, \tilde a)$
    - `with_betas` (`released_range`, `target_beta`):
      $\beta \sim U(\beta_0, \beta_1) \text{ offline, } \beta = b(x), x \sim \pi_b(\cdot \mid s) \text{ online}$
    - `balance_loss` (`balance_lr`): $L_b = -\min_i Q_i(s, a),\; a \sim \pi(\cdot \mid s, b(x))$
    - `critic_loss` (`conservative.weight`): $L_Q = \text{TD} + w\, g \text{ of CQL}$
    """

    balance_actor: Any = None
    """The balance network, a `Model`."""
    fine_tuning: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: SACConfig = FamO2OCQLConfig()) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        if not isinstance(config, FamO2OCQLConfig):
            raise ConfigError(f"FamO2OCQL got a {type(config).__name__}; expected a FamO2OCQLConfig")
        rng, actor_rng, balance_rng = jax.random.split(rng, 3)
        agent = super().create(rng, observations, actions, config)
        betas = jnp.zeros(observations.shape[:-1])
        encoding = {"encoding_dim": config.encoding_dim, "encoding_base": config.encoding_base}
        actor = build_actor(actions.shape[-1], config, FamilyActor, **encoding)
        own = build_actor(1, replace(config, actor_hidden_dims=config.balance_hidden_dims))
        agent = agent.replace(
            actor=Model.create(actor_rng, actor, Adam(config.actor_lr), observations, betas),
            balance_actor=Model.create(balance_rng, own, Adam(config.balance_lr), observations),
        )
        return jax.tree.map(jnp.asarray, agent)

    @property
    def settings(self) -> FamO2OCQLConfig:
        """The config, under its own type."""
        assert isinstance(self.config, FamO2OCQLConfig)
        return self.config

    def to_beta(self, x: Array) -> Array:
        """Return the coefficients of the balance network's x `[..., 1]`, shape `[...]`."""
        low, high = self.settings.balance_range
        if self.settings.released_range:
            return x[..., 0] * (high - low) + low
        return coefficient(x[..., 0], (low, high))

    def balance(self, observations: Array) -> Array:
        """Return the coefficient of every state, `[..., D]` to `[...]`, without randomness."""
        return self.to_beta(self.balance_actor(observations).mode())

    def with_betas(self, batch: Batch, rng: Array) -> Batch:
        """Return the batch with the coefficients of its states, `betas`, and of their next ones, `next_betas`."""
        uniform_rng, own_rng, next_rng = jax.random.split(rng, 3)
        states, following = batch["observations"], batch["next_observations"]
        own = self.to_beta(self.balance_actor(states).sample(own_rng))
        beta = own if self.fine_tuning else uniform_betas(uniform_rng, own.shape, self.settings.balance_range)
        after = own
        if self.settings.target_beta == "next":
            after = self.to_beta(self.balance_actor(following).sample(next_rng))
        return {**batch, "betas": beta, "next_betas": after}

    def policy(self, batch: Batch, params: Params | None = None) -> TanhNormal:
        """Return pi(.|s, beta) at the batch's observations `[..., D]` and their `betas`."""
        return self.actor(batch["observations"], batch["betas"], params=params)

    def next_policy(self, batch: Batch) -> TanhNormal:
        """Return pi(.|s', beta') at the batch's next observations `[..., D]` and their `next_betas`."""
        return self.actor(batch["next_observations"], batch["next_betas"])

    def policy_value(self, batch: Batch, actions: Array, critic: Model) -> Array:
        """Return beta Q(s, a) `[B]`: the actor's loss is mean (alpha log pi - beta Q)."""
        return batch["betas"] * super().policy_value(batch, actions, critic)

    def balance_loss(self, params: Params, batch: Batch, rng: Array, critic: Model) -> tuple[Array, Info]:
        """Return -mean Q(s, a), a drawn at the beta of a drawn x, on rows `[B, ...]`, and metrics."""
        x_rng, action_rng = jax.random.split(rng)
        states = batch["observations"]
        policy = self.balance_actor(states, params=params)
        x, log_prob = policy.sample_and_log_prob(x_rng)
        actions = self.actor(states, self.to_beta(x)).sample(action_rng)
        loss = -jnp.mean(super().policy_value(batch, actions, critic))
        return loss, {**balance_info(self.to_beta(policy.mode()), log_prob), "balance/loss": loss}

    def update_policy(self, batch: Batch, rng: Array, critic: Model) -> tuple[Self, Info]:
        """Step actor, temperature and balance network on rows `with_betas`, all from the present parameters."""
        actor_rng, balance_rng = jax.random.split(rng)
        agent, info = super().update_policy(batch, actor_rng, critic)
        loss = jax.grad(self.balance_loss, has_aux=True)
        grads, balance = loss(self.balance_actor.params, batch, balance_rng, critic)
        info = {**info, **balance, "actor/beta": batch["betas"].mean(), "actor/beta_std": batch["betas"].std()}
        return agent.replace(balance_actor=self.balance_actor.apply_gradients(grads)), info

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Run `utd` critic steps and one step of actor, temperature and balance on leaves `[utd, B, ...]`."""
        rng, beta_rng = jax.random.split(self.rng)
        return super(FamO2OCQL, self.replace(rng=rng)).update(self.with_betas(batch, beta_rng))

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1] at each state's `balance`: a sample, or tanh of the mean."""
        policy = self.actor(observations, self.balance(observations))
        return policy.mode() if deterministic else policy.sample(rng), carry

    def online(self) -> Self:
        """Return the agent whose actor is trained at the balance network's coefficients; the losses go on."""
        return super().online().replace(fine_tuning=True)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the published locomotion settings, and for other families these with CQL's term and rewards."""
        preset, (_, term, _, _) = CQL.preset(family, size), family_settings(family)
        config = FamO2OCQLConfig()
        if family != "locomotion":
            config = replace(config, conservative=replace(term, subset=None))
        if size == "small":
            config = shrink(shrink_term(config), utd_ratio=1, rate=1e-3)
            config = replace(config, balance_hidden_dims=config.actor_hidden_dims, balance_lr=config.actor_lr)
            return replace(preset, config=config)
        config = replace(config, released_range=True, target_beta="current")
        if family == "locomotion":
            return replace(preset, config=config, offline_steps=2_000_000, online_steps=1_000_000)
        return replace(preset, config=config)
