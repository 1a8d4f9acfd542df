"""PEX: policy expansion (arXiv 2302.00935): the offline policy stays as it is, and a new one learns beside it.

Offline it is IQL. Online the offline policy is frozen, a second one starts from scratch, and each state's action is
chosen between the two by a soft maximum of their values; critics and V go on as IQL. The new policy is fitted by IQL's
weighted regression, but to fresh actions of the pair in place of the buffer's. So a random newcomer costs little
(the values know better) and nothing that was learnt offline is forgotten.

The switch changes the policy on purpose: wherever the newcomer's action is valued as highly, it may act.

| what | paper | its code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| evaluation | - | random with 0.1 | 0.1 | 0.1 (`evaluation_randomness`) |
| offline actor's rate | - | cosine to 0 | constant | constant (`actor_decay_steps`) |
| kappa | 10 at r - 1 | 10 | 10 over the reward's scale: 1 on Adroit | 10 |

Where we differ
- The regression weighs with V and target critics from before their step, as everything else does
  (`update_order="simultaneous"`); the published code reads V(s') before, but the weights after their steps.
- Adam's moments of critics and V go on; the code loads parameters only. The offline actor's rate is constant; the
  code's falls to 0 along a cosine (`actor_decay_steps`).
- Proposals are clipped to [-1, 1] before they are valued, regressed to and played.
- `inverse_temperature` is on the scale of Q: 10 for rewards of -1 per step, so 1 on Adroit, whose rewards are IQL's.
- A deterministic evaluation keeps `evaluation_randomness` of 0.1, as published; 0 makes it deterministic.
- Left out: the repository's comparisons (scratch, buffer, direct: our SAC, RLPD and IQL stand for them).
- Presets: expectile 0.9 and beta 10 on mazes and locomotion (the README's commands), locomotion with its own rewards;
  Adroit and Kitchen, not in the paper, and all small ones follow IQL's presets.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp

from o2o.agents.iql import IQL, IQLConfig, preset_settings
from o2o.agents.registry import register_agent
from o2o.agents.wsrl import input_dims
from o2o.errors import ConfigError
from o2o.nn.modules import Adam, Init, Model
from o2o.settings import Between, NotNegative, Share
from o2o.types import Array, Batch, Carry, Info, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class PEXConfig(IQLConfig):
    """Settings of policy expansion: IQL's, and how the two policies share."""

    expectile: Between = 0.9
    """Expectile of the value loss, in (0, 1); 0.5 is a plain mean."""
    beta: NotNegative = 10.0
    """Inverse temperature of the advantage weights; 0 is behaviour cloning."""
    update_order: Literal["sequential", "simultaneous"] = "simultaneous"
    """`sequential`: V first, then actor and Q with the new V (IQL's code); `simultaneous`: all from the old
    parameters (PEX's code, but for the weights)."""
    init_scheme: Init = "xavier"
    """Initialiser of every kernel."""
    inverse_temperature: NotNegative = 10.0
    """Kappa of the soft maximum, on the scale of Q: 0 chooses at random, infinity the better one."""
    evaluation_randomness: Share = 0.1
    """Probability that a deterministic action has the new policy sampled, and, drawn apart, the choice."""
    online: OnlineConfig = OnlineConfig(warmup_steps=5000, replay="mixed", offline_ratio=0.5)
    """Online phase: half of each minibatch from the dataset, the first update after 5000 steps of both policies."""


_DEFAULT = PEXConfig()


class Choice(NamedTuple):
    """A choice between the two policies at observations `[..., D]`."""

    actions: Array
    """The chosen ones, `[..., A]`."""
    new: Array
    """Whether they are the new policy's, bool `[...]`."""
    probability: Array
    """Of the new policy's, `[...]`."""


@register_agent("pex")
class PEX(IQL):
    r"""Policy expansion: IQL that keeps the offline policy frozen and learns another beside it.

    `base` is the frozen policy, `actor` the new one.

    Equations (method, and the settings that enter):
    - `probabilities` (`inverse_temperature`):
      $a_1 = \mu_{\mathrm{off}}(s),\; a_2 \sim \pi(\cdot \mid s),\quad P(a_j) \propto e^{\kappa \min_i Q_i(s,
      a_j)}$
    - `choose` (`evaluation_randomness`): $a = a_j,\; j \sim P$
    - `actor_loss` (`beta`, `weight_cap`):
      $L_\pi = -\min(e^{\beta (Q^-(s, \tilde a) - V(s))}, w) \log \pi(\tilde a \mid s),\; \tilde a \text{ of
      the pair}$
    """

    base: Params = None
    """Parameters of the offline policy; `None` offline, where `actor` is that policy."""

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: IQLConfig = _DEFAULT) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        if not isinstance(config, PEXConfig):
            raise ConfigError(f"PEX got a {type(config).__name__}; expected a PEXConfig")
        return super().create(rng, observations, actions, config)

    @property
    def pair_settings(self) -> PEXConfig:
        """The config, by its own type."""
        assert isinstance(self.config, PEXConfig)
        return self.config

    def probabilities(self, q: Array) -> Array:
        """Return the probability `[2, ...]` of each policy given its action's lowest value `q [2, ...]`."""
        return jax.nn.softmax(self.pair_settings.inverse_temperature * q, axis=0)

    def choose(self, observations: Array, rng: Array, randomness: float = 1.0) -> Choice:
        """Choose between the pair's actions; where randomness strikes policy and choice are drawn, else the best."""
        keys = jax.random.split(rng, 4)
        shape = observations.shape[:-1]
        known = self.actor(observations, params=self.base).mode()
        policy = self.actor(observations)
        drawn = jax.random.uniform(keys[0], (*shape, 1)) < randomness
        proposed = jnp.where(drawn, policy.sample(keys[1]), policy.mode())
        pair = jnp.clip(jnp.stack([known, proposed]), -1.0, 1.0)
        probability = self.probabilities(self.critic(observations, pair).min(axis=0))[1]
        drawn = jax.random.uniform(keys[2], shape) < randomness
        new = jnp.where(drawn, jax.random.uniform(keys[3], shape) < probability, probability > 0.5)
        return Choice(jnp.where(new[..., None], pair[1], pair[0]), new, probability)

    def actor_loss(self, params: Params, batch: Batch, value: Model, rng: Array) -> tuple[Array, Info]:
        """Return IQL's weighted regression `[]`; online to a fresh action of the pair at each state of the batch."""
        if self.base is None:
            return super().actor_loss(params, batch, value, rng)
        rng, choice_rng = jax.random.split(rng)
        choice = jax.lax.stop_gradient(self.choose(batch["observations"], choice_rng))
        loss, info = super().actor_loss(params, {**batch, "actions": choice.actions}, value, rng)
        return loss, {**info, "pex/new_share": choice.probability.mean()}

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1] of the pair (offline of the one policy), and the unused carry."""
        if self.base is None:
            return super().sample_actions(observations, carry, rng, deterministic)
        randomness = self.pair_settings.evaluation_randomness if deterministic else 1.0
        return self.choose(observations, rng, randomness).actions, carry

    def online(self) -> Self:
        """Return the agent with its policy frozen and a new one, at its first parameters, beside it."""
        if self.base is not None:
            return self
        rng, new_rng = jax.random.split(self.rng)
        observation_dim, _ = input_dims(self.actor)
        example = jnp.zeros((1, observation_dim))
        new = Model.create(new_rng, self.actor.module, Adam(self.config.actor_lr), example)
        return self.replace(base=self.actor.params, actor=jax.tree.map(jnp.asarray, new), rng=rng)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks (arXiv 2302.00935); `small` for a laptop, after IQL's."""
        settings, rest = preset_settings(family, size)
        reward, own = rest["reward"], dict[str, Any]()
        if size == "small":
            own["online"] = replace(_DEFAULT.online, warmup_steps=1000)
        elif family not in ("adroit", "kitchen"):
            own |= {"expectile": _DEFAULT.expectile, "beta": _DEFAULT.beta}
            rest = {"offline_steps": 1_000_000, "online_steps": 1_000_000, "reward": reward}
        kappa = 10.0 / (reward[0] if reward is not None else 1.0)
        return Preset(PEXConfig(**{**settings, **own}, inverse_temperature=kappa), **rest)
