# %% [markdown]
# # 2. Compare two agents, with intervals
#
# One run of each agent says little: seeds differ. Here both train three seeds side by side, and every
# claim has an interval.

# %%
AGENTS = ("awac", "td3bc")
SEEDS, OFFLINE, ONLINE = 3, 2_000, 3_000
EVERY, EPISODES = 1_000, 20
CHANGES = {}  # settings of both agents that differ from their presets

# %%
import o2o
from o2o import envs

dataset = envs.make_embedded(envs.DEMO_DATASET)
for agent in AGENTS:
    run = o2o.preset_run(
        agent, dataset, "small", seeds=SEEDS, config=CHANGES, offline_steps=OFFLINE, online_steps=ONLINE
    )
    run = o2o.with_fields(run, {"loop": {"eval_every": EVERY, "eval_episodes": EPISODES}})
    o2o.train_run(run, f"runs/{agent}")

# %% [markdown]
# The band is a 95 % bootstrap interval over seeds. Episodes of one seed are never counted as independent runs.

# %%
o2o.plot_runs([f"runs/{agent}" for agent in AGENTS], metric="success", statistic="mean")

# %% [markdown]
# ## Numbers
#
# `aggregate` makes one number per seed and evaluation out of the episodes; `interval` resamples the seeds.

# %%
from pathlib import Path

from o2o.report.plots import pool
from o2o.report.stats import aggregate, interval, mean, probability_of_improvement

ends = {}
for agent in AGENTS:
    points = aggregate(pool([Path("runs") / agent]), "success")
    for when, point in (("pre-trained", [p for p in points if p.phase == "offline"][-1]), ("end", points[-1])):
        low, high = interval(point.values)
        seeds = ", ".join(f"{value:.0%}" for value in point.values)
        print(f"{agent:6} {when:12} {mean(point.values):4.0%} [{low:.0%}, {high:.0%}], seeds {seeds}")
    ends[agent] = points[-1].values

# %% [markdown]
# ## Which is better?
#
# The probability that a seed of the first agent beats a seed of the second; 0.5 is no difference. Three seeds give a
# rough answer only: an interval of width zero is what resampling three seeds can say, not certainty.

# %%
chance, low, high = probability_of_improvement(ends[AGENTS[0]], ends[AGENTS[1]])
print(f"P({AGENTS[0]} > {AGENTS[1]}) = {chance:.2f} [{low:.2f}, {high:.2f}]")

# %% [markdown]
# For a table of several agents, tasks and seeds, write a suite: `examples/my_suite.py`, then `o2o bench run` and
# `o2o bench report`.
