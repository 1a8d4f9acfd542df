# %% [markdown]
# # 1. Fine-tune in ten cells
#
# A small dataset of a maze, an agent that learns from it, and the same agent after it has practised in the environment.
# The ball starts somewhere in a U-shaped maze and has to reach a goal. The recorded controller often fails.

# %%
OFFLINE, ONLINE = 4_000, 8_000  # gradient steps on the dataset; steps in the environment
EVERY, EPISODES = 1_000, 20  # steps between two evaluations; episodes in each
CHANGES = {}  # settings of the agent that differ from the preset

# %% [markdown]
# ## The data

# %%
import matplotlib.pyplot as plt
import numpy as np

import o2o
from o2o import datasets, envs

dataset = envs.make_embedded(envs.DEMO_DATASET)  # made in seconds, unless it is there already
about = envs.describe(dataset)
for key in ("env", "episodes", "steps", "observations", "actions", "success"):
    print(f"{key:13} {about[key]}")

# %%
data = datasets.load(dataset, task=envs.task_for(datasets.info(dataset)))
ends = np.flatnonzero(data.arrays["ends"])
places = data.arrays["observations"][:, 2:4]  # x and y; the first two numbers are the goal's
figure, axes = plt.subplots(figsize=(5, 4))
for begin, end, success in zip([0, *ends[:-1] + 1], ends, data.info.episode_success):
    axes.plot(*places[begin:end].T, color="#0072B2" if success else "#D55E00", linewidth=0.7, alpha=0.6)
axes.set(title="recorded paths: blue reached the goal, orange did not", xlabel="x", ylabel="y", aspect="equal")
plt.show()

# %% [markdown]
# ## Train
#
# WSRL learns from the dataset with Cal-QL. Then it drops the data, acts for a while without learning (the warm-up), and
# goes on as plain SAC. The preset `small` is for a laptop.

# %%
run = o2o.preset_run("wsrl", dataset, "small", offline_steps=OFFLINE, online_steps=ONLINE, config=CHANGES)
run = o2o.with_fields(run, {"loop": {"eval_every": EVERY, "eval_episodes": EPISODES}})
print(f"{run.agent}: {run.offline_steps} gradient steps, then {run.online_steps} steps in the environment")

# %%
o2o.train_run(run, "runs/first")  # in Jupyter with a bar below the cell

# %%
o2o.plot_runs("runs/first")

# %% [markdown]
# ## Before and after
#
# Every evaluation began in the same states, so the two columns compare.

# %%
from pathlib import Path

from o2o.files import read_rows

rows = read_rows(Path("runs/first/episodes.jsonl"))
for name, phase in (("pre-trained", "offline"), ("fine-tuned", "online")):
    last = [row for row in rows if row["phase"] == phase][-EPISODES:]
    success, length = (np.mean([row[key] for row in last]) for key in ("success", "length"))
    print(f"{name:12} reached the goal in {success:4.0%} of {len(last)} episodes, after {length:.0f} steps on average")

# %% [markdown]
# The trained policy acts in any loop. It takes the observation as the environment gives it.

# %%
import gymnasium

env = gymnasium.make(envs.specification(datasets.info(dataset)))
policy = o2o.load_policy("runs/first")
figure, axes = plt.subplots(figsize=(5, 4))
for seed in range(min(8, EPISODES)):
    observation, _ = env.reset(seed=seed)
    policy.reset(seed)
    path, over = [observation["achieved_goal"]], False
    while not over:
        observation, _, terminated, truncated, info = env.step(policy.act(observation))
        path.append(observation["achieved_goal"])
        over = terminated or truncated or info["success"]
    (line,) = axes.plot(*np.array(path).T, linewidth=1.2)
    axes.plot(*observation["desired_goal"], marker="*", markersize=12, color=line.get_color())
axes.set(title="paths of the fine-tuned policy, stars are goals", xlabel="x", ylabel="y", aspect="equal")
env.close()
plt.show()

# %% [markdown]
# The run folder holds everything: settings, metrics, checkpoints, and a page to share.

# %%
from o2o.report.page import write_page

page = write_page("runs/first")
print(f"{page.name}: {page.stat().st_size / 1000:.0f} kB, opens in any browser")
