# %% [markdown]
# # 4. An agent of your own, from parts
#
# Advantage-weighted regression with one value network, in about fifty lines. Once it is registered it trains,
# resumes, exports and plots as any other.

# %%
OFFLINE, ONLINE = 3_000, 0
EPISODES = 20
CHANGES = {}  # settings of the agent that differ from its preset

# %% [markdown]
# ## Settings
#
# A frozen dataclass. The annotation of a field is its type and range; Python, JSON and the command line check it.

# %%
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

import o2o
from o2o import envs
from o2o.nn.modules import Adam, GaussianActor, Model, Value
from o2o.rl.losses import advantage_weights
from o2o.settings import NotNegative, Rate, Widths
from o2o.types import Needs, OnlineConfig, Preset


@dataclass(frozen=True)
class AWRConfig(o2o.AgentConfig):
    """Settings of advantage-weighted regression."""

    beta: NotNegative = 3.0
    """Inverse temperature of the advantage weights; 0 is cloning."""
    hidden_dims: Widths = (128, 128)
    """Widths of both networks' hidden layers."""
    learning_rate: Rate = 1e-3
    """Adam's rate of both networks."""
    online: OnlineConfig = OnlineConfig(replay="none")
    """It learns from the dataset only."""

    @property
    def needs(self):
        """Monte-Carlo returns of the dataset."""
        return Needs(batch_keys=("mc_returns",))


# %% [markdown]
# ## The agent
#
# A frozen pytree with pure methods. `update` takes leaves `[utd, B, ...]` and returns the next agent and metrics.


# %%
@o2o.register_agent("notebook_awr")
class AWR(o2o.Agent):
    """V regresses on returns, the actor clones what was better than V."""

    actor: Model
    value: Model
    config: AWRConfig = struct.field(pytree_node=False)

    @classmethod
    def create(cls, rng, observations, actions, config=AWRConfig()):
        """Initialise from a key and example rows."""
        actor_rng, value_rng = jax.random.split(rng)
        actor = GaussianActor(config.hidden_dims, actions.shape[-1], squash=False)
        adam = Adam(config.learning_rate)
        return cls(
            actor=Model.create(actor_rng, actor, adam, observations),
            value=Model.create(value_rng, Value(config.hidden_dims), adam, observations),
            config=config,
        )

    def losses(self, actor_params, value_params, rows):
        """Return the sum of both losses on rows [B, ...]; neither sees the other's parameters."""
        v = self.value(rows["observations"], params=value_params)
        advantages = jax.lax.stop_gradient(rows["mc_returns"] - v)
        advantages = advantages / (jnp.abs(advantages).mean() + 1e-8)
        weights = advantage_weights(advantages, self.config.beta, 20.0)
        log_prob = self.actor(rows["observations"], params=actor_params).log_prob(rows["actions"])
        value_loss, actor_loss = jnp.mean((v - rows["mc_returns"]) ** 2), -jnp.mean(weights * log_prob)
        info = {"value/loss": value_loss, "actor/loss": actor_loss, "actor/weight": weights.mean()}
        return value_loss + actor_loss, info

    def update(self, batch):
        """Take one step of both networks on every minibatch."""

        def step(agent, rows):
            grads, info = jax.grad(agent.losses, argnums=(0, 1), has_aux=True)(
                agent.actor.params, agent.value.params, rows
            )
            actor, value = agent.actor.apply_gradients(grads[0]), agent.value.apply_gradients(grads[1])
            return agent.replace(actor=actor, value=value), info

        agent, infos = jax.lax.scan(step, self, batch)
        return agent, jax.tree.map(jnp.mean, infos)

    def sample_actions(self, observations, carry, rng, deterministic=False):
        """Return actions in [-1, 1], and no memory."""
        policy = self.actor(observations)
        return jnp.clip(policy.mode() if deterministic else policy.sample(rng), -1.0, 1.0), carry

    @classmethod
    def preset(cls, family, size="paper"):
        """Return one setting for everything."""
        return Preset(AWRConfig(batch_size=256), offline_steps=3_000, online_steps=0)


# %% [markdown]
# ## Is it one?
#
# A wrong setting is one line, as for the toolkit's own agents.

# %%
try:
    AWRConfig(beta=-1.0)
except o2o.O2OError as error:
    print(error)

# %% [markdown]
# ## Train it beside cloning

# %%
dataset = envs.make_embedded(envs.DEMO_DATASET)
loop = {"eval_every": 0, "offline_eval_every": max(1, OFFLINE // 6), "eval_episodes": EPISODES}
for agent, changes in (("notebook_awr", {}), ("bc", {"loss": "nll"})):
    run = o2o.preset_run(agent, dataset, "small", offline_steps=OFFLINE, online_steps=ONLINE, loop=loop)
    run = o2o.with_fields(run, {"config": {**changes, **CHANGES.get(agent, {})}})
    o2o.train_run(run, f"runs/{agent}")

# %%
o2o.plot_runs(["runs/notebook_awr", "runs/bc"], metric="success")

# %% [markdown]
# In a file `my_agents.py` the same class trains by `o2o train my_agents:AWR --dataset ID`. The documentation's page on
# own agents walks through one with critics, and says which tests it needs.
