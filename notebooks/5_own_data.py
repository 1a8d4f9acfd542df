# %% [markdown]
# # 5. Own data, to a policy that acts without o2o
#
# Logs of a small robot in an npz file, the same data as a LeRobot dataset, cloning, and an exported policy.

# %%
EPISODES, STEPS = 60, 1_000  # recorded episodes; gradient steps
FILE = "policy.onnx"  # or policy.jax
CHANGES = {}  # settings of the agent that differ from the preset

# %% [markdown]
# ## What a lab has: rows, and where episodes end
#
# The robot drives in a square of two metres to a goal, at most 0.1 m per step.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def drive(act, seed, most=40):
    """Drive from a random place to a random goal; return what was seen and done, and whether the goal was reached."""
    place, goal = np.random.default_rng(seed).uniform(-1, 1, (2, 2)).astype(np.float32)
    seen, done = [], []
    for _ in range(most):
        seen.append({"goal": goal, "place": place})
        done.append(np.clip(act(seen[-1]), -1, 1).astype(np.float32))
        place = place + 0.1 * done[-1]
        if np.linalg.norm(goal - place) < 0.1:
            return seen, done, True
    return seen, done, False


noise = np.random.default_rng(0)
human = lambda seen: 5 * (seen["goal"] - seen["place"]) + 0.3 * noise.standard_normal(2)
rows = {"observations/goal": [], "observations/place": [], "actions": []}
ends = []
for seed in range(EPISODES):
    seen, done, _ = drive(human, seed)
    rows["observations/goal"] += [row["goal"] for row in seen]
    rows["observations/place"] += [row["place"] for row in seen]
    rows["actions"] += done
    ends.append(len(rows["actions"]))
np.savez("logs.npz", episode_ends=ends, **{key: np.array(value) for key, value in rows.items()})
print(f"{EPISODES} episodes, {ends[-1]} rows")

# %% [markdown]
# ## Import
#
# `plan_import` says what would become what, and writes nothing. The file has no rewards and does not say
# what succeeded; a recorded drive ends at its goal, so `success="last"`.

# %%
from o2o import datasets
from o2o.data.importers.plan import Options
from o2o.data.importers.write import import_dataset, plan_import

options = Options(success="last")
plan, licence = plan_import(Path("logs.npz"), options=options)
for column, is_, becomes in plan.table():
    print(f"{column:20} {is_:28} {becomes}")

# %%
done = import_dataset(Path("logs.npz"), "lab/drive-v0", options=options, root=Path("data"))
print(f"imported {done.episodes} episodes, {done.steps} steps")

# %% [markdown]
# ## LeRobot, there and back
#
# The same dataset as a LeRobot folder, for tools of that world; a LeRobot dataset of your own comes in the same way.

# %%
from o2o.data.lerobot_export import to_lerobot

folder = to_lerobot(done.folder, Path("lerobot/drive"), fps=10)
again = import_dataset(folder, "lab/back-v0", options=options, root=Path("data"))
print(f"from LeRobot: {again.episodes} episodes, {again.steps} steps")

# %% [markdown]
# ## Train without an environment
#
# Nothing can be played, so the run is judged by the error of its actions on held-out episodes.

# %%
import o2o

settings = {"loss": "mse", "actor_lr": 1e-3, **CHANGES}
run = o2o.preset_run("bc", done.folder, "small", config=settings, offline_steps=STEPS, online_steps=0)
o2o.train_run(run, "runs/drive")
o2o.plot_runs("runs/drive")

# %% [markdown]
# ## Export, and act
#
# The file and its contract (`.json`) are all that the robot needs; `examples/deploy.py` loads them with NumPy and
# onnxruntime alone. Here the same file is opened through o2o, which loads any exported policy.

# %%
o2o.session.export_run("runs/drive", FILE)
data = datasets.load(str(done.folder))
controller = o2o.session.load_base(FILE).controller(data)
controller.reset(0)
act = lambda seen: controller.act(data.observation_spec.flatten(seen))
paths = [drive(act, seed) for seed in range(1000, 1000 + min(20, EPISODES))]
print(f"reached {sum(reached for *_, reached in paths)} of {len(paths)} goals")

# %%
figure, axes = plt.subplots(figsize=(4.6, 4))
for seen, _, reached in paths:
    (line,) = axes.plot(*np.array([row["place"] for row in seen]).T, linewidth=1.2, linestyle="-" if reached else ":")
    axes.plot(*seen[0]["goal"], marker="*", markersize=10, color=line.get_color())
axes.set(title="paths of the exported policy, stars are goals", xlabel="x (m)", ylabel="y (m)", aspect="equal")
plt.show()
