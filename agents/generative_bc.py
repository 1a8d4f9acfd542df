"""DiffusionBC and FlowBC: behaviour cloning by a generative model of action chunks.

Both are agents of their own and serve as base policies of others. A chunk of `horizon` actions is one vector, modelled
given the observation at its start. DiffusionBC uses a diffusion (DDPM or DDIM; arXiv 2006.11239, 2010.02502, as
policies in 2303.04137 and 2409.00588), FlowBC flow matching (2210.02747, as in FQL, 2502.02538). The first `execute`
actions of a chunk are played open loop; then another chunk is drawn. An exponential moving average of the trained
network acts. Online the policy collects but learns nothing.

`deterministic` acting starts the deterministic sampler (DDIM for both diffusion samplers) at zero noise. For one action
coordinate that is the median of the learned distribution. The median lies in the larger of two modes, and between two
modes of equal weight. The papers evaluate samples: `deterministic_eval` False in the run's loop, `--sample` in
`o2o eval`.

| what | papers' codes | `paper` preset | default |
| --- | --- | --- | --- |
| flow's network, average, chunks | FQL: `mlp`, none, none | the same (`flow_bc`) | `residual`, 0.001, 1 |
| diffusion's average | DPPO: 0.005 every tenth step from epoch 20 on | `ema_rate` at every step | the same |
| evaluation | samples | the run's `deterministic_eval` | mode |

Where we differ
- Networks: `residual` is EXPO's, `mlp` is FQL's, its first draw included. DPPO has plain or residual MLPs with time in
  16 or 32 sinusoids.
- DPPO's AdamW rate falls to a tenth (1e-3 on hopper, 1e-4 on square), ours from 3e-4 to zero. Its average takes 0.005
  every tenth step from epoch 20 on, ours `ema_rate` at every step.
- States are taken as they are, or by mean and std (the run's `normalize`). [-1, 1] is the action space, or the data's
  range (`action_range`). DPPO maps the ranges of both to [-1, 1].
- DDIM takes all steps of the diffusion; DPPO and DSRL take some of them.
- A chunk that reaches behind its episode's end repeats the last action there, and those entries have no loss. DPPO cuts
  no such chunk. FQL's authors count the entries as zeros in the mean (QC).
- FQL has neither a moving average nor chunks: its presets have `ema_rate` 1 and `horizon` 1.
- Cloning only: fine-tuning by DPPO, DSRL or DiWA (2508.03645) is left out.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents.minibatches import check_flat, each_minibatch
from o2o.agents.registry import register_agent
from o2o.nn.generative import Denoiser, Diffusion, Flow
from o2o.nn.modules import Adam, Model
from o2o.rl.chunks import ActionQueue, empty_queue, next_action
from o2o.rl.windows import flat_chunk, repeat_last
from o2o.settings import Average, Count, Dropout, NotNegative, Rate, Width, Widths
from o2o.types import Agent, AgentConfig, Array, Batch, Carry, Info, Needs, OnlineConfig, Params, Phase, Preset


@dataclass(frozen=True)
class GenerativeBCConfig(AgentConfig):
    """Settings of both agents."""

    horizon: Count = 1
    """Actions predicted at once."""
    execute: Count | None = None
    """Actions of a prediction played before the next one; `None` for all of them."""
    network: Literal["residual", "mlp"] = "residual"
    """`residual`: EXPO's, time in Fourier features; `mlp`: FQL's, time as a number."""
    actor_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of `mlp`."""
    width: Width = 256
    """Width of `residual`; four times as wide inside its blocks."""
    blocks: Count = 3
    """Blocks of `residual`."""
    dropout: Dropout = 0.0
    """Dropout in the network, active in the loss only."""
    actor_lr: Rate = 3e-4
    """Adam rate at the start."""
    decay_steps: Count | None = None
    """Cosine decay of the rate to 0 over this many updates; `None` for a constant one."""
    weight_decay: NotNegative = 1e-6
    """AdamW's decay."""
    ema_rate: Average = 0.001
    """Weight of the new parameters in the average that acts; 1 acts with the trained network itself."""
    online: OnlineConfig = OnlineConfig(replay="none")
    """Online phase: act and store, never update."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.execute is not None and self.execute > self.horizon:
            raise self.refuse("execute", f"1 to {self.horizon}, the horizon")

    @property
    def needs(self) -> Needs:
        """Windows of one chunk."""
        return Needs(window=self.horizon)


@dataclass(frozen=True)
class DiffusionBCConfig(GenerativeBCConfig):
    """Settings of diffusion cloning."""

    model: Diffusion = Diffusion(20, "cosine", clip="prediction")
    """Steps, schedule and sampler."""


@dataclass(frozen=True)
class FlowBCConfig(GenerativeBCConfig):
    """Settings of flow cloning."""

    model: Flow = Flow()
    """Euler steps."""


class GenerativeBC(Agent):
    """Cloning of chunks by the generative model `config.model`."""

    actor: Model
    average: Params
    """Moving average of the actor's parameters, which acts."""
    rng: Array
    config: Any = struct.field(pytree_node=False)
    action_dim: int = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: Any) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        check_flat(observations, cls.__name__)
        rng, actor_rng = jax.random.split(rng)
        network = Denoiser(
            config.network,
            hidden_dims=config.actor_hidden_dims,
            blocks=config.blocks,
            width=config.width,
            dropout=config.dropout,
        )
        optimizer = Adam(config.actor_lr, config.decay_steps, config.weight_decay)
        chunks = jnp.tile(actions, config.horizon)
        actor = Model.create(actor_rng, network, optimizer, observations, chunks, jnp.zeros(actions.shape[:-1]))
        average = jax.tree.map(jnp.copy, actor.params)
        agent = cls(actor=actor, average=average, rng=rng, config=config, action_dim=actions.shape[-1])
        return jax.tree.map(jnp.asarray, agent)

    def chunks(self, batch: Batch) -> tuple[Array, Array, Array]:
        """Return first observations `[B, D]`, chunks `[B, H A]`, and 1 where an entry is of the episode, `[B, H A]`."""
        observations = batch["observations"]
        actions = batch["actions"]
        if self.needs.window == 1:
            return observations, actions, jnp.ones_like(actions)
        chunks, valid = flat_chunk(repeat_last(actions, batch["valid"]), batch["valid"])
        return observations[:, 0], chunks, valid

    def actor_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return the model's squared error, a mean over the entries within episodes, and metrics."""
        model_rng, dropout_rng = jax.random.split(rng)
        observations, chunks, valid = self.chunks(batch)

        def apply(x: Array, t: Array) -> Array:
            return self.actor(observations, x, t, training=True, params=params, rngs={"dropout": dropout_rng})

        errors = self.config.model.loss(apply, chunks, model_rng)
        loss = jnp.sum(valid * errors) / jnp.maximum(jnp.sum(valid), 1.0)
        return loss, {"actor/loss": loss, "actor/valid": jnp.mean(valid)}

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        """Step the network on one minibatch, then move its average."""
        rng, loss_rng = jax.random.split(self.rng)
        grads, info = jax.grad(self.actor_loss, has_aux=True)(self.actor.params, batch, loss_rng)
        actor = self.actor.apply_gradients(grads)
        average = optax.incremental_update(actor.params, self.average, self.config.ema_rate)
        return self.replace(actor=actor, average=average, rng=rng), info

    def update(self, batch: Batch) -> tuple[Self, Info]:
        """Take one step per minibatch of the leaves `[utd, B, ...]`, with chunks `[utd, B, W, ...]`; mean metrics."""
        return each_minibatch(lambda agent, rows: agent._step(rows), self, batch)

    def sample_chunks(self, observations: Array, rng: Array, deterministic: bool = False) -> Array:
        """Return chunks `[..., H, A]` in [-1, 1] for observations `[..., D]`, by the averaged network."""
        config = self.config
        lead = observations.shape[:-1]
        shape = (*lead, config.horizon * self.action_dim)
        noise_rng, step_rng = jax.random.split(rng)
        noise = jnp.zeros(shape) if deterministic else jax.random.normal(noise_rng, shape)
        model = config.model.deterministic() if deterministic else config.model

        def denoise(x: Array, t: Array) -> Array:
            return self.actor(observations, x, t, params=self.average)

        chunks = model.sample(denoise, noise, step_rng)
        return chunks.reshape(*lead, config.horizon, self.action_dim)

    @property
    def execute(self) -> int:
        """Actions played of one chunk."""
        return self.config.execute or self.config.horizon

    def sample_actions(
        self, observations: Array, carry: Carry, rng: Array, deterministic: bool = False
    ) -> tuple[Array, Carry]:
        """Return the next actions `[..., A]` of the chunks being played, and the queues without them.

        A new chunk is drawn where a queue is empty.
        """
        if self.execute == 1:
            return self.sample_chunks(observations, rng, deterministic)[..., 0, :], carry
        return next_action(carry, lambda: self.sample_chunks(observations, rng, deterministic), self.execute)

    def initial_carry(self, batch_shape: tuple[int, ...]) -> ActionQueue | None:
        """Return empty queues `[*batch_shape, h, A]`; `None` where every action is predicted anew."""
        return None if self.execute == 1 else empty_queue(batch_shape, self.execute, self.action_dim)

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Return one phase, with a note if the learning rate falls to 0 before its end."""
        decay = self.config.decay_steps
        if decay is None or steps <= decay:
            return (Phase("offline", steps),)
        note = (
            f"the learning rate falls to 0 by step {decay} of {steps} and nothing is learnt from there on; set "
            f"config.decay_steps to {steps} as well"
        )
        return (Phase("offline", steps, note=note),)


@register_agent("diffusion_bc")
class DiffusionBC(GenerativeBC):
    r"""Behaviour cloning of action chunks by diffusion.

    Equations (method, and the settings that enter):
    - `actor_loss` (`model.steps`, `model.schedule`):
      $x_t = \sqrt{c_t}\, A + \sqrt{1 - c_t}\, z,\quad L = \lVert \epsilon(s, x_t, t) - z
      \rVert^2$
    - `sample_chunks` (`model.sampler`, `model.temperature`): $x_{t-1} = \mu_t(x_t, \epsilon) + \sigma_t z$
    - `sample_actions` (`horizon`, `execute`): $A = (a_0, \ldots, a_{H-1}), \text{ the first } k \text{ are played}$
    """

    @classmethod
    def create(
        cls, rng: Array, observations: Array, actions: Array, config: DiffusionBCConfig = DiffusionBCConfig()
    ) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        return super().create(rng, observations, actions, config)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks; no online steps.

        `paper`: DPPO's 20 cosine steps, chunks of 4, AdamW at 3e-4 with cosine decay. Network and budgets are EXPO's:
        500k updates on mazes, as on its AntMaze; else 200k, as on its robomimic square. `small`: EXPO's 10 steps,
        2 blocks of 128, batch 128, 10k updates at 1e-3.
        """
        if size == "small":
            config = DiffusionBCConfig(
                model=Diffusion(10, "vp", clip="prediction"),
                horizon=4,
                width=128,
                blocks=2,
                actor_lr=1e-3,
                decay_steps=10_000,
                ema_rate=0.005,
                batch_size=128,
            )
            return Preset(config, offline_steps=10_000, online_steps=0)
        steps = 500_000 if family in ("antmaze", "pointmaze") else 200_000
        return Preset(DiffusionBCConfig(horizon=4, decay_steps=steps), offline_steps=steps, online_steps=0)


@register_agent("flow_bc")
class FlowBC(GenerativeBC):
    r"""Behaviour cloning of action chunks by flow matching.

    Equations (method, and the settings that enter):
    - `actor_loss` (`model.steps`): $x_t = (1 - t) z + t A,\quad L = \lVert v(s, x_t, t) - (A - z) \rVert^2$
    - `sample_chunks` (`model.steps`): $x_{t + 1/K} = x_t + v(s, x_t, t) / K$
    - `sample_actions` (`horizon`, `execute`): $A = (a_0, \ldots, a_{H-1}), \text{ the first } k \text{ are played}$
    """

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: FlowBCConfig = FlowBCConfig()) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        return super().create(rng, observations, actions, config)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks; no online steps.

        `paper`: FQL's behaviour flow, 4x512, Adam 3e-4, batch 256, no average, no chunks, 1M updates (Adroit and
        AntMaze 500k). `small`: 2x128, batch 128, 10k updates at 1e-3 with cosine decay, averaged.
        """
        if size == "small":
            config = FlowBCConfig(
                network="mlp",
                actor_hidden_dims=(128, 128),
                actor_lr=1e-3,
                decay_steps=10_000,
                ema_rate=0.005,
                batch_size=128,
                weight_decay=0.0,
            )
            return Preset(config, offline_steps=10_000, online_steps=0)
        steps = 500_000 if family in ("antmaze", "adroit") else 1_000_000
        config = FlowBCConfig(network="mlp", ema_rate=1.0, weight_decay=0.0)
        return Preset(config, offline_steps=steps, online_steps=0)
