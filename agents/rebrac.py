"""ReBRAC: behaviour-regularised actor-critic revisited (arXiv 2305.09836).

TD3+BC with two penalties on the distance to the data, each with its own weight. One is in the actor's loss, between its
action and the logged one. The other is in the critics' target, between the target actor's next action and the logged
next action. The critics have LayerNorm, all networks three hidden layers.

Where we differ from the paper and its code (tinkoff-ai/ReBRAC)

| what | paper and code | `paper` preset | default |
| --- | --- | --- | --- |
| last row before a time limit | dropped | kept, no penalty in its target: it has no next action | the same |
| actor's target | averages the actor from before its step | averages the new one (`o2o.agents.td3`) | the same |
| the actor's turns | calls 0, 2, 4, ... | calls 1, 3, 5, ...: as often | the same |
| initial values | biases 0.1, outputs within 1e-3 (actor), 3e-3 (critics) | the same (`start`) | 0; as other layers |
| weights of the penalties | one pair for each dataset | AntMaze, locomotion: `PENALTIES`, by its id; else one | 0.01 |
| PointMaze, Kitchen | none | AntMaze's settings; the defaults | - |
| Adroit's rewards | dense | -1/0 for success, the house's task | the task's |
| OGBench | none | QAM's table: chunks of 5, 10 critics, no penalty in the target | - |
| OGBench: targets | by 0.005 every second step (QAM's code) | by 0.0025 every step | - |
| OGBench: initial values | the actor's output layer a tenth of the others' size (QAM's code) | the same (`start`) | - |
| OGBench: noise when acting | in evaluation too (QAM's code) | the same | - |
| OGBench: order | all losses at the parameters before the step, which targets average (QAM's code) | as above | - |
| online | none | same losses, one buffer, action noise 0.2, clipped (seohongpark/fql) | the same |
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import jax
import jax.numpy as jnp

from o2o.agents import ogbench
from o2o.agents.chunked import ByChunks
from o2o.agents.registry import register_agent
from o2o.agents.td3 import TD3, TD3Config
from o2o.nn.modules import Activation
from o2o.rl.losses import lower_bound, td_target
from o2o.settings import NotNegative, Widths
from o2o.types import Array, Batch, ChunkedConfig, Info, Needs, OnlineConfig, Params, Preset


@dataclass(frozen=True)
class ReBRACConfig(TD3Config, ChunkedConfig):
    """Settings of ReBRAC."""

    actor_penalty: NotNegative = 0.01
    """Weight of |pi(s) - a|^2 in the actor's loss (beta_1), on a scale where Q has the mean size 1."""
    critic_penalty: NotNegative = 0.01
    """Weight of |a' - a'_data|^2 in the target (beta_2), in units of the reward; 0 with chunks."""
    pessimism: NotNegative | None = None
    """The critics' value is mean - pessimism * std over all of them (rho), for target and actor; `None`: the least."""
    activation: Activation = "relu"
    """Activation of actor and critics."""
    actor_hidden_dims: Widths = (256, 256, 256)
    """Widths of the actor's hidden layers."""
    critic_hidden_dims: Widths = (256, 256, 256)
    """Widths of every critic's hidden layers."""
    critic_layer_norm: bool = True
    """LayerNorm behind each activation of the critics."""
    exploration_noise: NotNegative = 0.2
    """Standard deviation of the Gaussian noise on sampled actions, which `noise_clip` bounds too."""
    start: Literal["plain", "rebrac", "fql"] = "plain"
    """Initial values. `rebrac`: hidden biases 0.1, output layers uniform within 1e-3 (actor) and 3e-3 (critics). `fql`:
    the actor's output layer is a tenth as large as `plain`'s."""
    online: OnlineConfig = OnlineConfig(replay="append")
    """Online phase: one buffer that starts with the dataset, one update per step."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values out of range, or that do not go together."""
        super().__post_init__()
        if self.chunk > 1 and self.critic_penalty:
            raise self.refuse("critic_penalty", f"0 with chunk={self.chunk}: the data's next chunk is not drawn")

    @property
    def needs(self) -> Needs:
        """The next action of the data, and where there is one; with chunks windows of one chunk."""
        return Needs(window=self.chunk, batch_keys=() if self.chunk > 1 else ("next_actions", "next_valid"))


PENALTIES: dict[str, dict[str, tuple[float, float]]] = {
    "locomotion": {"halfcheetah medium": (0.001, 0.01), "walker2d medium": (0.05, 0.1)},
    "antmaze": {
        "umaze diverse": (0.003, 0.001),
        "umaze": (0.003, 0.002),
        "medium play": (0.001, 0.0005),
        "medium diverse": (0.001, 0.0),
        "large diverse": (0.002, 0.002),
    },
}
"""The paper's `actor_penalty` and `critic_penalty` by words of a dataset's id, where not the family's. Those of
Adroit are for dense rewards, and have no place beside -1/0."""
_DEFAULT = ReBRACConfig()


@register_agent("rebrac")
class ReBRAC(ByChunks, TD3):
    r"""ReBRAC: TD3 with a penalty on the distance to the data, in the actor's loss and in the critics' target.

    Equations (method, and the settings that enter):
    - `targets` (`critic_penalty`):
      $y = r + \gamma m (\min_k Q^-_k(s', a') - \beta_2 \lVert a' - a'_{\mathrm{data}} \rVert^2)$
    - `critic_step` (`critic_layer_norm`): $L_Q = \sum_i (Q_i(s, a) - y)^2$
    - `actor_loss` (`actor_penalty`):
      $L_\pi = \beta_1 \lVert \pi(s) - a \rVert^2 - \frac{\min_k Q_k(s, \pi(s))}{\mathrm{mean} \lvert Q \rvert}$
    """

    @classmethod
    def create(cls, rng: Array, observations: Array, actions: Array, config: ReBRACConfig = _DEFAULT) -> Self:
        """Initialise from a key and example observations `[B, D]` and actions `[B, A]`."""
        agent = super().create(rng, observations, jnp.tile(actions, config.chunk), config)
        judges = agent.critic.module.clone(norm_last=True, activation=config.activation)  # the same parameters
        policy = agent.actor.module.clone(activation=config.activation)
        agent = agent.replace(actor=agent.actor.replace(module=policy), critic=agent.critic.replace(module=judges))
        return agent.started()

    def started(self) -> Self:
        """Return the agent with the initial values of `start`, and targets that equal its networks."""
        if self.config.start == "plain":
            return self
        rng, actor_rng, critic_rng = jax.random.split(self.rng, 3)
        actor, critic = self.actor.params["params"], self.critic.params["params"]
        if self.config.start == "fql":
            actor = {**actor, "Dense_0": {**actor["Dense_0"], "kernel": 0.1 * actor["Dense_0"]["kernel"]}}
        else:
            actor = {"MLP_0": _biased(actor["MLP_0"]), "Dense_0": _within(actor["Dense_0"], 1e-3, actor_rng)}
            critic = {**_biased(critic), "output": _within(critic["output"], 3e-3, critic_rng)}
        actor, critic = ({"params": each} for each in (actor, critic))
        return self.replace(
            actor=self.actor.replace(params=actor),
            critic=self.critic.replace(params=critic),
            target_actor=jax.tree.map(jnp.copy, actor),
            target_critic=jax.tree.map(jnp.copy, critic),
            rng=rng,
        )

    def value(self, q: Array) -> Array:
        """Return the critics' common value `[...]` of `q [E, ...]`: the least, or mean - rho std."""
        return q.min(axis=0) if self.config.pessimism is None else lower_bound(q, self.config.pessimism)

    def targets(self, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return y = r + discount m (min_k Q'_k(s', a') - beta_2 |a' - a'_data|^2) `[B]`, and the mean distance.

        a' is the target actor's action with clipped noise. Without a next action in the data there is no penalty.
        """
        actions = self.noisy_actions(batch["next_observations"], self.target_actor, rng)
        q = self.value(self.critic(batch["next_observations"], actions, params=self.target_critic))
        if self.config.chunk > 1:
            return td_target(batch["rewards"], batch["masks"], q, self.config.discount), {}
        distance = batch["next_valid"] * jnp.sum(jnp.square(actions - batch["next_actions"]), axis=-1)
        values = q - self.config.critic_penalty * distance
        targets = td_target(batch["rewards"], batch["masks"], values, self.config.discount)
        return targets, {"critic/distance": distance.mean()}

    def actor_loss(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, Info]:
        """Return mean(beta_1 |pi(s) - a|^2 - min_k Q_k(s, pi(s)) / mean |min_k Q_k|) `[]` on leaves `[B, ...]`.

        Chunks that their episode's end cuts short have no penalty.
        """
        actions = self.actor(batch["observations"], training=True, params=params, rngs={"dropout": rng})
        q = self.value(self.critic(batch["observations"], actions))
        size = jnp.maximum(jax.lax.stop_gradient(jnp.abs(q).mean()), 1e-8)
        distance = jnp.sum(jnp.square(actions - batch["actions"]), axis=-1)
        distance = jnp.mean(batch["valid"] * distance if "valid" in batch else distance)
        loss = self.config.actor_penalty * distance - q.mean() / size
        return loss, {"actor/loss": loss, "actor/distance": distance, "actor/q_size": size}

    def explore(self, actions: Array, rng: Array) -> Array:
        """Return actions `[..., A]` with clipped exploration noise, clipped to [-1, 1]."""
        noise = self.config.exploration_noise * jax.random.normal(rng, actions.shape)
        return jnp.clip(actions + jnp.clip(noise, -self.config.noise_clip, self.config.noise_clip), -1.0, 1.0)

    def q_value(self, observations: Array, actions: Array) -> Array | None:
        """Return the least critic's value `[...]` of actions `[..., A]` at observations `[..., D]`.

        None: the critics judge whole chunks.
        """
        return None if self.config.chunk > 1 else self.critic(observations, actions).min(axis=0)

    @classmethod
    def preset(cls, family: str, size: Literal["paper", "small"] = "paper") -> Preset:
        """Return the settings for a family of tasks.

        `paper`: 1M updates (the paper's) and 1M environment steps. Batch 1024 and rates of 1e-3 on locomotion, else
        256 and 3e-4; on mazes 5e-5 for the critics. OGBench's tasks have the settings of the published curves
        (`o2o.agents.ogbench`). `small`: 2x128, batch 128, rates of 1e-3, 10k updates and 10k
        environment steps. Its policy stays closer to the data on locomotion (0.4, TD3+BC's weight): the paper's 0.01
        is too little for so few updates.
        """
        maze = family in ("antmaze", "pointmaze")
        config = ReBRACConfig()
        if family == "locomotion":
            config = replace(config, batch_size=1024, actor_lr=1e-3, critic_lr=1e-3)
        if family == "adroit":
            config = replace(config, actor_penalty=0.1, critic_penalty=0.1)
        if maze:
            config = replace(config, actor_penalty=0.002, critic_penalty=0.001, critic_lr=5e-5, discount=0.999)
        reward = (100.0, 0.0) if maze else (1.0, 0.0) if family == "adroit" else None
        if size == "paper":
            config = replace(config, start="rebrac")
            preset = Preset(config, 1_000_000, 1_000_000, reward)
            tasks = {
                words: replace(preset, config=replace(config, actor_penalty=actor, critic_penalty=critic))
                for words, (actor, critic) in PENALTIES.get(family, {}).items()
            }
            return replace(preset, tasks=_ogbench() | tasks)
        widths = {"actor_hidden_dims": (128, 128), "critic_hidden_dims": (128, 128)}
        small = replace(config, **widths, batch_size=128, actor_lr=1e-3, critic_lr=1e-3, tau=0.01)
        if family == "locomotion":
            small = replace(small, actor_penalty=0.4)
        return Preset(small, 10_000, 10_000, reward)


def _ogbench() -> dict[str, Preset]:
    """Return the settings of OGBench's tasks (QAM's table): weight of the actor's penalty, and noise."""
    config = ReBRACConfig(
        **ogbench.CHUNKS,
        num_critics=10,
        pessimism=0.5,
        actor_penalty=0.01,
        critic_penalty=0.0,
        actor_hidden_dims=ogbench.WIDTHS,
        critic_hidden_dims=ogbench.WIDTHS,
        activation="gelu",
        init_scheme="xavier",
        policy_delay=1,
        tau=0.0025,
        target_noise=0.0,
        exploration_noise=0.0,
        start="fql",
        online=ogbench.ONLINE,
    )
    noisy = {"target_noise": 0.2, "exploration_noise": 0.2}
    own = {"scene": {"actor_penalty": 0.03}, "puzzle 3x3": {"actor_penalty": 0.1}}
    own |= {domain: noisy for domain in ("cube triple", "cube quadruple", "puzzle 4x4")}
    own["humanoidmaze large"] = {"target_noise": 0.1, "exploration_noise": 0.1}
    return ogbench.presets(config, own)


def _biased(layers: Params) -> Params:
    """Return layers whose linear ones have biases of 0.1; those of a LayerNorm stay 0."""
    return {
        name: layer if "norm" in name.lower() else {**layer, "bias": jnp.full_like(layer["bias"], 0.1)}
        for name, layer in layers.items()
    }


def _within(layer: Params, bound: float, rng: Array) -> Params:
    """Return a layer of uniform numbers in [-bound, bound]."""
    keys = dict(zip(layer, jax.random.split(rng, len(layer)), strict=True))
    return {name: jax.random.uniform(keys[name], x.shape, x.dtype, -bound, bound) for name, x in layer.items()}
