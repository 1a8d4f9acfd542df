"""IBRL: imitation-bootstrapped reinforcement learning (arXiv 2311.02198).

A frozen cloned policy proposes a second action wherever the learner's policy proposes one: at every step, and in every
bootstrap. The target critics choose between the two. So imitation guides exploration and lifts the targets from the
start, and does not hold the learner back later. The learner is TD3 with n-step returns.

Offline only the clone learns (squared error, `BC`); actor and critics do not move. `online()` freezes the clone and
starts the learner from scratch, so the policy changes at the switch. The clone alone plays the warm-up
(`random_steps`). `ibrl/reference_share` is the share of the clone's actions in the targets; it falls as the learner
overtakes the clone.

| what | paper and code (Can, states) | `paper` preset | default |
| --- | --- | --- | --- |
| choice of the action | soft, 10; Meta-World hard | soft where rewards are 0/1, else hard | soft (`choice`) |
| demonstrations | ten | the whole dataset | the same |
| warm-up | 40 episodes, not counted | 5000 steps, counted | the same |

Where we differ
- State observations only, one at a time; the code stacks three (the run's `history`). Numbers are those of Can from
  states. Where rewards are not 0/1 the choice is "hard" (Meta-World's rule).
- The whole dataset is cloned and preloaded, not ten demonstrations. The replay is one ring that starts with it.
- The warm-up is 5000 environment steps and counts; the code plays 40 episodes that do not count. `utd_ratio` 2 and an
  actor step per 5 critic steps stand for the code's block of 5 and 1 every 2 environment steps.
- A deterministic action is the best by the minimum over all target critics. The code draws a subset there too, and
  with the soft rule samples the choice, but reports the hard one beside it.
- Each critic has its own LayerNorm; in the code they share its scale and bias. Biases start at zero.
- Actions are clipped to [-1, 1]; the code clips to 1 - 1e-6. The clone's gradient is not clipped (100 in the code).
- A window that a true terminal cuts short ends there; time limits bootstrap (`timeouts`). As published, n-step returns
  are not corrected for the actions in between.
- Left out: "RFT" (the actor pre-trained and held to demonstrations), epsilon-greedy choice, a decaying noise.
- None of our families of tasks is in the paper. Rewards are 0/1 on mazes and Adroit, else the task's own.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import struct

from o2o.agents.bc import BC, BCConfig
from o2o.agents.registry import register_agent
from o2o.agents.td3 import TD3, TD3Config
from o2o.nn.modules import CriticEnsemble, draw_members
from o2o.rl import losses
from o2o.rl.windows import Timeouts, n_step_rows
from o2o.settings import Average, Count, Dropout, NotNegative, Rate, Widths
from o2o.types import Array, Batch, Carry, Info, Needs, OnlineConfig, Params, Preset

WIDE = (1024, 1024, 1024)


@dataclass(frozen=True)
class IBRLConfig(TD3Config):
    """Settings of IBRL; the defaults are the released ones for Can from states."""

    choice: Literal["soft", "hard"] = "soft"
    """`hard`: the action with the higher value; `soft`: a draw from the softmax of the values."""
    inverse_temperature: NotNegative = 10.0
    """Of the soft rule, on the scale of Q: 10 is for rewards of 0 and 1."""
    target_subset: Count | None = 2
    """Target critics drawn for each choice and each target; their minimum counts. `None`: all critics."""
    n_step: Count = 3
    """Rewards summed before the target bootstraps."""
    timeouts: Timeouts = "bootstrap"
    """What a time limit does to the target: end it like a terminal, or bootstrap."""
    clone_hidden_dims: Widths = WIDE
    """Widths of the cloned policy's hidden layers."""
    clone_dropout: Dropout = 0.5
    """Dropout while cloning."""
    clone_lr: Rate = 1e-4
    """Adam's rate of the cloning."""
    actor_hidden_dims: Widths = WIDE
    """Widths of the actor's hidden layers."""
    critic_hidden_dims: Widths = WIDE
    """Widths of every critic's hidden layers."""
    critic_layer_norm: bool = True
    """LayerNorm before each activation of the critics."""
    actor_dropout: Dropout = 0.5
    """Dropout in the actor's hidden layers: on in every loss and, as published, in the targets; off when it acts."""
    num_critics: Count = 5
    """Critics in the ensemble."""
    policy_delay: Count = 5
    """Critic steps per actor step."""
    delayed_targets: bool = False
    """True: the critics' targets move with the actor's. False: they move after every critic step."""
    target_noise: NotNegative = 0.1
    """Standard deviation of the noise on the actor's action, in the targets and in its own loss."""
    noise_clip: NotNegative = 0.3
    """Bound of that noise."""
    actor_lr: Rate = 1e-4
    """Adam's rate of the actor."""
    critic_lr: Rate = 1e-4
    """Adam's rate of the critics."""
    tau: Average = 0.01
    """Weight of the new parameters in the targets' averages."""
    online: OnlineConfig = OnlineConfig(utd_ratio=2, random_steps=5000, replay="append")
    """Online phase: one buffer that starts with the dataset; the clone plays `random_steps` before any update."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.target_subset is not None and self.target_subset > self.num_critics:
            raise self.refuse("target_subset", f"1 to num_critics={self.num_critics}, or None")

    @property
    def needs(self) -> Needs:
        """Windows of at least two rows: one row cannot say where an episode ended."""
        return Needs(window=max(self.n_step, 2))


_DEFAULT = IBRLConfig()


class Choice(NamedTuple):
    """A choice between the clone's action and another at observations `[..., D]`."""

    actions: Array
    """The chosen actions, `[..., A]`."""
    cloned: Array
    """Whether the clone's action was chosen, bool `[...]`."""


@register_agent("ibrl")
class IBRL(TD3):
    r"""Imitation-bootstrapped RL: a clone and TD3 both propose an action, the critics choose.

    `reference` is the cloned policy.

    Equations (method, and the settings that enter):
    - `choose` (`choice`, `inverse_temperature`):
      $a = \arg\max_{a \in \{\pi(s),\, \pi_{\mathrm{BC}}(s)\}} \min_{i \in S} Q^-_i(s, a)$
    - `targets` (`n_step`, `target_subset`):
      $y = R + \gamma^k m \min_{i \in S} Q^-_i(s_k, a'), \text{ the same choice of } a'$
    - `actor_loss` (`actor_dropout`): $L_\pi = -\min_j Q_j(s, \pi(s) + \epsilon)$
    """

    reference: Any = None
    """A `BC` agent: learning offline, frozen online."""
    fine_tuning: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: IBRLConfig = _DEFAULT) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        rng, clone_rng = jax.random.split(rng)
        agent = super().create(rng, observations, actions, config)
        cloning = BCConfig(
            loss="mse",
            actor_hidden_dims=config.clone_hidden_dims,
            dropout=config.clone_dropout,
            init_scheme=config.init_scheme,
            actor_lr=config.clone_lr,
            batch_size=config.batch_size,
        )
        return agent.replace(reference=BC.create(clone_rng, observations, actions, cloning))

    def cloned_actions(self, observations: Array) -> Array:
        """Return the cloned policy's actions `[..., A]`; it draws nothing."""
        return self.reference.sample_actions(observations, None, self.rng, True)[0]

    def lowest_target(self, observations: Array, actions: Array, rng: Array, subset: int | None) -> Array:
        """Return the minimum `[...]` over `subset` randomly drawn target critics; over all of them with `None`."""
        assert isinstance(self.critic.module, CriticEnsemble)
        critics, params = draw_members(self.critic.module, self.target_critic, rng, subset)
        return jnp.min(jnp.asarray(critics.apply(params, observations, actions)), axis=0)

    def choose(self, observations: Array, actions: Array, rng: Array, deterministic: bool = False) -> Choice:
        """Choose between the clone's actions and `actions` `[..., A]`, by the target critics."""
        config = self.config
        member_rng, choice_rng = jax.random.split(rng)
        pair = jnp.stack([actions, self.cloned_actions(observations)])
        q = self.lowest_target(observations, pair, member_rng, None if deterministic else config.target_subset)
        cloned = q[1] > q[0]
        if config.choice == "soft" and not deterministic:
            probability = jax.nn.sigmoid(config.inverse_temperature * (q[1] - q[0]))
            cloned = jax.random.uniform(choice_rng, q[0].shape) < probability
        return Choice(jnp.where(cloned[..., None], pair[1], pair[0]), cloned)

    def targets(self, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return y = R + gamma^k m Q'(s_k, a') `[B]` of rows from `n_step_rows`, and the clone's share of a'."""
        next_observations = batch["next_observations"]
        action_rng, choice_rng, member_rng = jax.random.split(rng, 3)
        own = self.noisy_actions(next_observations, self.target_actor, action_rng)
        choice = self.choose(next_observations, own, choice_rng)
        values = self.lowest_target(next_observations, choice.actions, member_rng, self.config.target_subset)
        targets = losses.td_target(batch["rewards"], batch["masks"], values, 1.0)  # the masks hold gamma^k
        return targets, {"ibrl/reference_share": choice.cloned.mean()}

    def actor_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return -mean min_j Q_j(s, a) `[]` over all critics, a the actor's own with noise, and metrics."""
        actions = self.noisy_actions(batch["observations"], params, rng)
        loss = -self.critic(batch["observations"], actions).min(axis=0).mean()
        return loss, {"actor/loss": loss}

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Take one step per minibatch of windows `[utd, B, W, ...]`: of the clone offline, of the learner online."""
        config = self.config
        if self.fine_tuning:
            return super().update(n_step_rows(batch, config.n_step, config.discount, config.timeouts))
        first = {key: batch[key][:, :, 0] for key in ("observations", "actions")}
        reference, info = self.reference.update(first)
        rng, _ = jax.random.split(self.rng)
        agent = self.replace(reference=reference, rng=rng)
        return agent, {name.replace("actor/", "reference/"): value for name, value in info.items()}

    def q_value(self, observations: Array, actions: Array) -> Array:
        """Return the least critic's value `[...]` of actions `[..., A]` at observations `[..., D]`."""
        return self.critic(observations, actions).min(axis=0)

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return actions `[..., A]` in [-1, 1]: the clone's offline, the chosen ones online.

        Unless `deterministic` there is exploration noise, online on the learner's own action only.
        """
        noise_rng, choice_rng = jax.random.split(rng)
        own = self.actor(observations) if self.fine_tuning else self.cloned_actions(observations)
        actions = own if deterministic else self.explore(own, noise_rng)
        if not self.fine_tuning:
            return actions, carry
        return self.choose(observations, actions, choice_rng, deterministic).actions, carry

    def random_actions(self, observations: Array, rng: Array, action_dim: int) -> Array:
        """Return the actions `[..., A]` of the warm-up: the clone's."""
        return self.cloned_actions(observations)

    def online(self) -> Self:
        """Return the agent with the clone frozen; from here on the learner trains, as it was initialised."""
        return self.replace(fine_tuning=True)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: those of Can from states, 100k cloning steps and 200k environment steps. `small`: 2x128, 4 critics,
        batch 128, no dropout, faster rates, a warm-up of 1000 steps, 5k cloning and 10k environment steps.
        """
        reward = {"antmaze": (1.0, 0.0), "pointmaze": (1.0, 0.0), "adroit": (1.0, 1.0)}.get(family)
        config = IBRLConfig(choice="hard" if reward is None else "soft")
        if size == "paper":
            return Preset(config, 100_000, 200_000, reward)
        width = (128, 128)
        config = replace(
            config,
            actor_hidden_dims=width,
            critic_hidden_dims=width,
            clone_hidden_dims=width,
            num_critics=4,
            batch_size=128,
            actor_dropout=0.0,
            clone_dropout=0.0,
            actor_lr=3e-4,
            critic_lr=1e-3,
            clone_lr=1e-3,
            policy_delay=2,
            online=replace(config.online, random_steps=1000),
        )
        return Preset(config, 5_000, 10_000, reward)
