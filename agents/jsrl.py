"""JSRL: jump-start reinforcement learning (arXiv 2204.02372), over IQL.

Offline it is IQL. At the switch the policy is frozen as the guide; online the guide plays the first h steps of each
episode and the learner, IQL on everything that either of them did, plays the rest. So the learner starts from states
that the guide reaches, and takes over as h shrinks. Evaluation (deterministic acting) is the learner's alone, h = 0.

The policy's carry counts the steps of the episode and holds its h, drawn at the episode's first step.

| what | paper | third-party code | `paper` preset | default |
| --- | --- | --- | --- | --- |
| h | falls as the mixed policy keeps its return; or random | the same | random | random (`guide_steps`) |
| learner | any; here IQL | SAC and others | IQL's `paper` preset | a copy of the guide |
| H | - | 60 | a third of an episode | 60 (`max_guide_steps`) |

Where we differ
- The paper's curriculum lowers h when the mixed policy's evaluated return is as good as the best so far; an agent of
  ours never sees evaluations. Here h is `random` (the paper's other variant), uniform in {0, ..., H - 1} anew for each
  episode, or `fixed`, h = H; with `anneal_updates` H itself falls linearly from `max_guide_steps` to 0, so never rises.
- The guide acts h steps, none with h = 0; the third-party code's `t <= h` gives it h + 1.
- The guide samples its actions in training, as the learner does; both take their modes in evaluation.
- `learner` says what of the offline agent the learner starts from; the default keeps all, moments included.
- `max_guide_steps`, per family, is ours: about a third of an episode; 60 is the third-party example's.
- An evaluation with the loop's `deterministic_eval` off plays the mixed policy.
- Replay, losses, rewards and step counts are those of our IQL.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from o2o.agents.iql import IQL, IQLConfig, preset_settings
from o2o.agents.registry import register_agent
from o2o.agents.wsrl import input_dims
from o2o.errors import ConfigError
from o2o.settings import Amount, Count
from o2o.types import Array, Batch, Carry, Info, Params, Preset


@dataclass(frozen=True)
class JSRLConfig(IQLConfig):
    """Settings of jump-start RL: IQL's, and how guide and learner share an episode."""

    max_guide_steps: Amount = 60
    """H: no episode is guided for longer."""
    guide_steps: Literal["random", "fixed"] = "random"
    """`random`: uniform in {0, ..., H - 1} for each episode; `fixed`: H."""
    anneal_updates: Count | None = None
    """Online updates over which H falls linearly to 0; `None` for a constant H."""
    learner: Literal["copied", "fresh_policy", "fresh"] = "copied"
    """What the learner starts from: the offline agent; its critics and V, with a new policy; nothing."""


_DEFAULT = JSRLConfig()


class Episode(NamedTuple):
    """Where a policy stands in its episode, int32 `[...]` each."""

    step: Array
    """Steps taken."""
    guided: Array
    """Steps that are the guide's; meaningless before the first."""


@register_agent("jsrl")
class JSRL(IQL):
    r"""Jump-start RL: a frozen copy of the offline policy begins the episodes, IQL ends them.

    `actor` is the learner's policy.

    Equations (method, and the settings that enter):
    - `sample_actions`: $a_t = \pi_{\mathrm{guide}}(s_t) \text{ for } t < h, \text{ else } \pi(s_t)$
    - `draw_guided` (`guide_steps`, `max_guide_steps`): $h \sim U\{0, \ldots, H - 1\}$
    - `horizon` (`anneal_updates`): $H_n = H (1 - n / N)$
    - `update` (`expectile`, `beta`, `learner`): $L_V, L_Q, L_\pi \text{ of IQL}$
    """

    guide: Params = None
    """Parameters of the offline policy; `None` offline."""
    updates: Any = None
    """Online updates, int32; `None` offline."""

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: IQLConfig = _DEFAULT) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        if not isinstance(config, JSRLConfig):
            raise ConfigError(f"JSRL got a {type(config).__name__}; expected a JSRLConfig")
        return super().create(rng, observations, actions, config)

    @property
    def jump(self) -> JSRLConfig:
        """The config, by its own type."""
        assert isinstance(self.config, JSRLConfig)
        return self.config

    def horizon(self) -> Array:
        """Return the present H, int32 `[]`."""
        config = self.jump
        if config.anneal_updates is None:
            return jnp.asarray(config.max_guide_steps, jnp.int32)
        ends = -(np.arange(1, config.max_guide_steps + 1) * -config.anneal_updates // config.max_guide_steps)
        return config.max_guide_steps - jnp.sum(self.updates >= ends, dtype=jnp.int32)  # exact, as no float32 is

    def draw_guided(self, rng: Array, shape: tuple[int, ...]) -> Array:
        """Return the guide's steps in new episodes, int32 of this shape."""
        horizon = self.horizon()
        if self.jump.guide_steps == "fixed":
            return jnp.broadcast_to(horizon, shape)
        return jax.random.randint(rng, shape, 0, jnp.maximum(horizon, 1), jnp.int32)

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        agent, info = super()._step(batch)
        if self.guide is None:
            return agent, info
        horizon = self.horizon().astype(jnp.float32)
        return agent.replace(updates=self.updates + 1), {**info, "jsrl/horizon": horizon}

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1], the guide's where its steps are not over, and the next carry."""
        guided_rng, act_rng = jax.random.split(rng)
        own, _ = super().sample_actions(observations, None, act_rng, deterministic)
        if self.guide is None:
            return own, carry
        drawn = self.draw_guided(guided_rng, observations.shape[:-1])
        guided = jnp.where(carry.step == 0, drawn, carry.guided)
        following = Episode(carry.step + 1, guided)
        if deterministic:
            return own, following
        guide: IQL = self.replace(actor=self.actor.replace(params=self.guide))
        theirs, _ = IQL.sample_actions(guide, observations, None, act_rng, deterministic)
        return jnp.where((carry.step < guided)[..., None], theirs, own), following

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Episode | None:
        """Return the carry of episodes about to begin, leaves `batch_shape`; `None` offline."""
        if self.guide is None:
            return None
        return Episode(jnp.zeros(batch_shape, jnp.int32), jnp.zeros(batch_shape, jnp.int32))

    def online(self) -> Self:
        """Return the agent with its policy as guide, and the learner that the config asks for."""
        if self.guide is not None:
            return self
        agent = super().online()
        if self.jump.learner != "copied":
            rng, fresh_rng = jax.random.split(self.rng)
            observation_dim, action_dim = input_dims(self.actor)
            fresh = self.create(fresh_rng, jnp.zeros((1, observation_dim)), jnp.zeros((1, action_dim)), self.config)
            fresh = super(JSRL, fresh).online().replace(rng=rng)
            agent = fresh if self.jump.learner == "fresh" else agent.replace(actor=fresh.actor, rng=rng)
        # A copy of its own: the loop gives the agent's buffers away at every step.
        return agent.replace(guide=jax.tree.map(jnp.copy, self.actor.params), updates=jnp.zeros((), jnp.int32))

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return IQL's settings for a family of tasks, with a guide for about a third of an episode."""
        settings, rest = preset_settings(family, size)
        steps = {"antmaze": 300, "pointmaze": 100, "kitchen": 100, "locomotion": 300}.get(family, 60)
        return Preset(JSRLConfig(**settings, max_guide_steps=steps), **rest)
