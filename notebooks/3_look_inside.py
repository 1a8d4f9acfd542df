# %% [markdown]
# # 3. Look inside
#
# What do the networks of a trained agent say? Each part trains one agent for a minute at most, and draws one thing.

# %%
OFFLINE, ONLINE = 2_000, 3_000
EPISODES = 10
CHANGES = {}  # agent: settings that differ from its preset

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import o2o
from o2o import datasets, envs, session

dataset = envs.make_embedded(envs.DEMO_DATASET)
about = datasets.info(dataset)


def train(agent, offline=OFFLINE, online=0, every=0, **changes):
    """Train an agent and open its run."""
    changes["config"] = {**changes.get("config", {}), **CHANGES.get(agent, {})}
    run = o2o.preset_run(agent, dataset, "small", offline_steps=offline, online_steps=online, **changes)
    loop = {"eval_every": every, "eval_episodes": EPISODES, "log_every": max(1, OFFLINE // 20)}
    run = o2o.with_fields(run, {"loop": loop, "base_timeout_s": None})
    o2o.train_run(run, f"runs/{agent}", quiet=True)
    return o2o.open_run(f"runs/{agent}")


best = jax.jit(lambda agent, rows: agent.sample_actions(rows, None, jax.random.key(0), True)[0])


def play(agent, env, seed):
    """Play one episode; return observations [T, D], actions [T, A] and rewards [T]."""
    observation, _ = env.reset(seed=seed)
    seen, done, rewards = [], [], []
    while True:
        seen.append(observation)
        done.append(np.asarray(best(agent, observation[None])[0]))
        observation, reward, terminated, truncated, _ = env.step(done[-1])
        rewards.append(reward)
        if terminated or truncated:
            return np.array(seen), np.array(done), np.array(rewards)


# %% [markdown]
# ## Q along an episode
#
# The critic predicts the discounted sum of rewards to come. Behind the episode the true sum is known. FamO2O's critics
# are IQL's: they learn values of the data's better actions, so they may lie above what this policy reaches.

# %%
config, trainer = train("famo2o")
agent = trainer.agent_of(0)
env = envs.make(about, trainer.data.task)
figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), sharey=True)
for seed, axes in enumerate(panels):
    seen, actions, rewards = play(agent, env, seed)
    q = np.asarray(agent.critic(jnp.asarray(seen), jnp.asarray(actions)).min(axis=0))
    total, returns = 0.0, np.zeros(len(rewards))
    for t in reversed(range(len(rewards))):
        returns[t] = total = rewards[t] + agent.config.discount * total
    axes.plot(q, color="#0072B2", label="lowest critic")
    axes.plot(returns, color="#D55E00", linestyle="--", label="discounted return of the episode")
    axes.set(title=f"episode {seed}", xlabel="step")
panels[0].legend(fontsize=8)
env.close()
plt.show()

# %% [markdown]
# ## The balance map
#
# FamO2O picks a coefficient for every state: small is close to the data, large trusts the critic.

# %%
from o2o.runs.balance import plot_balance

trainer.close()
plot_balance("runs/famo2o")

# %% [markdown]
# ## Base against edited actions
#
# EXPO draws actions from a diffusion that imitates the data, edits each by a bounded step, and plays the candidate with
# the highest Q. Left: all candidates in one state. Right: how often an edited one wins, over states of the dataset.

# %%
config, trainer = train("expo", online=ONLINE // 2)
agent = trainer.agent_of(0)
states = jnp.asarray(trainer.data.arrays["observations"][:: max(1, trainer.data.size // 500)])
choice = jax.jit(lambda agent: agent.choose(states, agent.target_base, jax.random.key(0)))(agent)
count, row = agent.config.n_samples, int(jnp.argmax(choice.scores.std(axis=0)))
base, edited = np.asarray(choice.candidates[:count, row]), np.asarray(choice.candidates[count:, row])
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for before, after in zip(base, edited):
    left.annotate("", after, before, arrowprops={"arrowstyle": "->", "color": "#999999"})
left.scatter(*base.T, color="#0072B2", label="base")
left.scatter(*edited.T, color="#D55E00", marker="s", label="edited")
left.scatter(*np.asarray(choice.actions[row]), s=160, facecolors="none", edgecolors="black", label="played")
left.set(title="candidates in one state", xlabel="action 1", ylabel="action 2", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
left.legend(fontsize=8)
gain = np.asarray(choice.scores[count:].max(axis=0) - choice.scores[:count].max(axis=0))
right.hist(gain, bins=30, color="#0072B2")
right.axvline(0, color="black", linewidth=1)
right.set(
    title=f"edited wins in {np.mean(gain > 0):.0%} of states", xlabel="best edited Q - best base Q", ylabel="states"
)
plt.show()
trainer.close()

# %% [markdown]
# ## Where the residual acts
#
# A cloned policy is frozen, and a residual policy learns corrections of bounded size on top of it. Arrows are the
# residual's action (a force) where it was played.

# %%
train("bc", offline=OFFLINE // 4)[1].close()
config, trainer = train("residual", offline=0, online=ONLINE, base="runs/bc")
from o2o.data.normalizer import normalize

agent = trainer.agent_of(0)
base = session.load_base("runs/bc")
env = session.make_env(config, trainer.data, base, evaluation=True)
correction = jax.jit(lambda agent, rows: agent.actor(agent.see(rows)))
places, residuals = [], []
for seed in range(EPISODES):
    observation, _ = env.reset(seed=seed)
    over = False
    while not over:
        rows = normalize(trainer.normalizer, jax.tree.map(lambda leaf: leaf[None], observation))
        residuals.append(np.asarray(correction(agent, rows)[0]))
        places.append(observation["state"][2:4])
        observation, _, terminated, truncated, _ = env.step(np.asarray(best(agent, rows)[0]))
        over = terminated or truncated
places, residuals = np.array(places)[::4], np.array(residuals)[::4]
figure, axes = plt.subplots(figsize=(5.6, 4))
size = np.linalg.norm(residuals, axis=1)
arrows = axes.quiver(*places.T, *residuals.T, size, cmap="viridis", scale=6, width=0.004)
figure.colorbar(arrows, label=f"size of the residual (at most {agent.config.residual_scale} per coordinate)")
axes.set(xlabel="x", ylabel="y", aspect="equal", title="the residual where it acted")
env.close()
trainer.close()
plt.show()

# %% [markdown]
# ## The switch
#
# What happens to a pre-trained policy when it begins to learn from its own steps? WSRL first acts without learning, so
# that the buffer is not empty. The evaluation is every tenth of the online phase.

# %%
train("wsrl", online=ONLINE, every=ONLINE // 10)[1].close()
from pathlib import Path

from o2o.files import read_rows
from o2o.report.plots import pool
from o2o.report.stats import aggregate

points = [point for point in aggregate(pool([Path("runs/wsrl")]), "success")]
online = [(0, points[0])] + [(p.env_steps, p) for p in points if p.phase != "offline"]
metrics = read_rows(Path("runs/wsrl/metrics.jsonl"))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.plot([step for step, _ in online], [point.values.mean() for _, point in online], marker="o", color="#0072B2")
left.axvspan(0, max(p.env_steps for p in points if p.phase == "warmup"), color="#E69F00", alpha=0.15)
left.set(title="success after the switch (shaded: warm-up)", xlabel="environment steps", ylim=(-0.05, 1.05))
right.plot(
    [r["gradient_steps"] for r in metrics if "critic/q" in r], [r["critic/q"] for r in metrics if "critic/q" in r]
)
right.axvline(OFFLINE, color="black", linewidth=1, linestyle="--")
right.set(title="mean Q of the minibatches (dashed: switch)", xlabel="gradient steps")
plt.show()
for step, point in online:
    print(f"{step:5} steps in the environment: success {point.values.mean():.0%}")
