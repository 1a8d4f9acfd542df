"""IFQL: implicit flow Q-learning, IQL's critic with a flow as the policy (baseline of FQL, arXiv 2502.02538).

A flow clones the data and sees no critic. V is an upper expectile of Q over the actions of the data, and Q bootstraps
from V, as in IQL. The policy is put together when it acts: of N samples of the flow it plays the one with the highest
Q. No learner ever evaluates an action that is not in the data, so online gains come through new data only. It is the
flow form of IDQL (2304.10573). With `chunk` h > 1 all of it is on chunks of h actions, played open loop.

    u    = agg_k Q'_k(s, a) - V(s)                               `value_loss`
    L_V  = mean valid |expectile - 1(u < 0)| u^2
    y    = R + discount^h m V(s_h)                               `targets`
    L_Q  = mean valid (Q_k(s, a) - y)^2                          `critic_loss`
    L_pi = mean (v(s, x_t, t) - (a - x_0))^2                     `flow_loss`
    act  : argmax_i min_k Q_k(s, a_i),  a_i = Flow(s, z_i)       `propose`, `score`

With `num_samples` 1 and `guidance` it acts by Q's gradient in place of selection: QGF (2606.11087), whose training is
this one, but for times of the flow's loss on the grid of its steps, t = 1 among them, and windows that an episode's end
cuts, which count for flow and V there. QGF's own networks have LayerNorm before GELU, in the flow too, and sinusoids of
time.

Deterministic acting starts from fixed noise, the same for every observation. The paper evaluates samples: set
`deterministic_eval` of the run's loop to False.

| what | FQL's paper and code | QAM's code (2601.14234's table) | `paper` preset | default |
| --- | --- | --- | --- | --- |
| critics, agg in L_V | 2, min | 10, mean - 0.5 std | OGBench: QAM's, else FQL's | FQL's |
| chunk h | 1 | 5, mazes 1 | the same on OGBench, else 1 | 1 |
| loss over critics | sum | mean | mean: the same step under Adam | the same |
| windows that an episode's end cuts | - | count in L_V, not in L_Q and L_pi | do not count | `pad_terminal` |
| choice among samples | argmax over all observations given | the same | for each observation | the same |
| first online update | first step | step 5000 | the same | first step |

Where we differ
- One Adam for each network, where the codes have one over the sum of the losses: the same steps.
- The entries of a cut chunk before the end are cloned; QAM's code leaves the whole row out.
- The ring has room for the dataset and `loop.replay_capacity` own steps.
- D4RL's settings are not published for IFQL. The presets have FQL's budgets and rewards, and the default expectile.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct

from o2o.agents import ogbench
from o2o.agents.chunked import ChunkedFlow
from o2o.agents.minibatches import check_flat
from o2o.agents.registry import register_agent
from o2o.nn.generative import Denoiser, Guidance
from o2o.nn.modules import Adam, CriticEnsemble, Model, Value
from o2o.rl.losses import expectile_loss, lower_bound, td_target
from o2o.rl.windows import Chunks, chunk_rows
from o2o.settings import Average, Between, Count, NotNegative, Rate, Widths
from o2o.types import Array, Batch, ChunkedConfig, Info, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class IFQLConfig(ChunkedConfig):
    """Settings of IFQL; the defaults are those of FQL's code."""

    expectile: Between = 0.9
    """Expectile of the value loss, in (0, 1); 0.5 is a plain mean."""
    num_samples: Count = 32
    """Flow samples N to choose from; 1 is cloning, or with `guidance` QGF."""
    guidance: Guidance = Guidance()
    """Q's gradient in the flow's steps, when acting only."""
    aggregate: Literal["min", "lower_bound"] = "min"
    """How L_V reduces over the target critics: `min`, or `lower_bound`, mean - rho std."""
    rho: NotNegative = 0.5
    """Standard deviations below the mean with `lower_bound`."""
    num_critics: Count = 2
    """Number of critics."""
    flow_steps: Count = 10
    """Euler steps of the flow."""
    actor_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of the flow's hidden layers."""
    critic_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of every critic's hidden layers."""
    value_hidden_dims: Widths = (512, 512, 512, 512)
    """Widths of the hidden layers of V."""
    actor_lr: Rate = 3e-4
    """Adam's rate of the flow."""
    critic_lr: Rate = 3e-4
    """Adam's rate of the critics."""
    value_lr: Rate = 3e-4
    """Adam's rate of V."""
    tau: Average = 0.005
    """Weight of the critics in the target's average, after every update."""
    online: OnlineConfig = OnlineConfig(replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step."""


_DEFAULT = IFQLConfig()


@register_agent("ifql")
class IFQL(ChunkedFlow):
    r"""Implicit flow Q-learning: IQL's critics choose among a flow's samples.

    Equations (method, and the settings that enter):
    - `value_loss` (`expectile`, `aggregate`, `rho`): $u = Q^- - V(s),\quad L_V = \lvert \tau - 1_{u < 0} \rvert u^2$
    - `targets` (`discount`, `chunk`): $y = R + \gamma^h m V(s_h)$
    - `critic_loss` (`num_critics`): $L_Q = (Q_k(s, a) - y)^2$
    - `flow_loss` (`flow_steps`): $L_v = \lVert v(s, x_t, t) - (a - x_0) \rVert^2$
    - `propose` (`num_samples`): $\arg\max_i \min_k Q_k(s, a_i),\quad a_i = \mathrm{Flow}(s, z_i)$
    """

    value: Model
    config: IFQLConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: IFQLConfig = _DEFAULT) -> Self:
        """Initialise from a key, observations `[B, D]` and actions `[B, A]`; dict observations raise `ConfigError`."""
        check_flat(observations, "IFQL")
        rng, flow_rng, critic_rng, value_rng = jax.random.split(rng, 4)
        chunks, times = jnp.tile(actions, config.chunk), jnp.zeros(actions.shape[:-1])
        flow = Denoiser("mlp", config.actor_hidden_dims)
        judges = CriticEnsemble(
            config.critic_hidden_dims, config.num_critics, True, "xavier", activation="gelu", norm_last=True
        )
        value = Value(config.value_hidden_dims, True, "xavier", activation="gelu", norm_last=True)
        critic = Model.create(critic_rng, judges, Adam(config.critic_lr), observations, chunks)
        agent = cls(
            actor=Model.create(flow_rng, flow, Adam(config.actor_lr), observations, chunks, times),
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic.params),
            value=Model.create(value_rng, value, Adam(config.value_lr), observations),
            rng=rng,
            config=config,
            action_dim=actions.shape[-1],
        )
        return jax.tree.map(jnp.asarray, agent)

    def value_loss(self, params: Params, chunks: Chunks) -> tuple[Array, Info]:
        """Return the expectile loss of agg Q'(s, a) - V(s), a mean in which invalid windows are zeros, and metrics."""
        config = self.config
        q = self.critic(chunks.observations, chunks.actions, params=self.target_critic)
        judged = jnp.min(q, axis=0) if config.aggregate == "min" else lower_bound(q, config.rho)
        v = self.value(chunks.observations, params=params)
        loss = expectile_loss(chunks.valid * (judged - v), config.expectile)
        return loss, {"value/loss": loss, "value/v": jnp.mean(v)}

    def targets(self, chunks: Chunks) -> Array:
        """Return y = R + discount^h m V(s_h) `[B]`."""
        next_values = self.value(chunks.next_observations)
        return td_target(chunks.returns, chunks.masks, next_values, self.config.discount**self.config.chunk)

    def critic_loss(self, params: Params, chunks: Chunks) -> tuple[Array, Info]:
        """Return the mean over critics and windows of valid (Q_k(s, a) - y)^2, and metrics."""
        targets = self.targets(chunks)
        q = self.critic(chunks.observations, chunks.actions, params=params)
        loss = jnp.mean(chunks.valid * jnp.square(q - targets))
        return loss, {"critic/loss": loss, "critic/q": jnp.mean(q), "critic/target": jnp.mean(targets)}

    def score(self, observations: Array, chunks: Array) -> Array:
        """Return min_k Q_k `[...]` of chunks `[..., n]`, by the critics and not their targets."""
        return jnp.min(self.critic(observations, chunks), axis=0)

    def _step(self, batch: Batch) -> tuple[Self, Info]:
        """Step all networks on windows `[B, h, ...]`, every loss at the present parameters."""
        config = self.config
        rng, flow_rng = jax.random.split(self.rng)
        chunks = chunk_rows(batch, config.discount, config.pad_terminal)
        value_grads, value_info = jax.grad(self.value_loss, has_aux=True)(self.value.params, chunks)
        critic_grads, critic_info = jax.grad(self.critic_loss, has_aux=True)(self.critic.params, chunks)
        flow_grads, flow_info = jax.grad(self.flow_loss, has_aux=True)(self.actor.params, chunks, flow_rng)
        agent = self.replace(
            actor=self.actor.apply_gradients(flow_grads),
            critic=self.critic.apply_gradients(critic_grads),
            target_critic=optax.incremental_update(self.critic.params, self.target_critic, config.tau),
            value=self.value.apply_gradients(value_grads),
            rng=rng,
        )  # the target follows the critics of before the step, as in the authors' code
        return agent, {**value_info, **critic_info, **flow_info}

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: 4x512, batch 256. OGBench's tasks have QAM's settings (`o2o.agents.ogbench`), 1M updates and 500k
        environment steps; the others FQL's budgets. Mazes and Adroit have rewards of -1/0. `small`: 2x128, batch 128,
        rates of 1e-3, 10k updates and 10k environment steps.
        """
        reward = {"antmaze": (1.0, -1.0), "pointmaze": (1.0, -1.0), "adroit": (1.0, 0.0)}.get(family)
        if size == "small":
            parts = ("actor", "critic", "value")
            sizes: dict[str, Any] = {f"{part}_hidden_dims": (128, 128) for part in parts}
            sizes |= {f"{part}_lr": 1e-3 for part in parts}
            return Preset(IFQLConfig(**sizes, batch_size=128, tau=0.01), 10_000, 10_000, reward)
        return Preset(IFQLConfig(), 1_000_000, 1_000_000, reward, tasks=_ogbench())


def _ogbench() -> dict[str, Preset]:
    """Return the settings of OGBench's tasks (QAM's table): the expectile."""
    config = IFQLConfig(**ogbench.CHUNKS, aggregate="lower_bound", num_critics=10, online=ogbench.ONLINE)
    expectiles = {"cube triple": 0.95, "cube quadruple": 0.95, "puzzle 3x3": 0.95}
    expectiles |= {"antmaze giant": 0.8, "humanoidmaze medium": 0.7, "humanoidmaze large": 0.8}
    return ogbench.presets(config, {domain: {"expectile": each} for domain, each in expectiles.items()}, rho="rho")
