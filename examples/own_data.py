"""From a lab's own logs to a policy that acts without o2o: import, train without an environment, export, act.

    pip install 'o2o[onnx]'
    python examples/own_data.py            # everything is written to ./own_data

The logs are of a small robot that drives to a goal in the plane. Put your own file in the place of `write_logs`, and
your robot in the place of `Robot`. Each step has the command that does the same.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np


class Robot:
    """It drives in a plane of 2 m x 2 m, at most 0.1 m per step; `goal` and `place` are in m."""

    def __init__(self, seed):
        """Begin at a random place, with a random goal."""
        rng = np.random.default_rng(seed)
        self.place, self.goal = rng.uniform(-1, 1, (2, 2)).astype(np.float32)

    def see(self):
        """Return what the policy sees."""
        return {"place": self.place.copy(), "goal": self.goal.copy()}

    def drive(self, command):
        """Move by `command` `[2]`, in tenths of a metre; return whether the goal is reached."""
        self.place = self.place + 0.1 * np.clip(command, -1, 1).astype(np.float32)
        return bool(np.linalg.norm(self.goal - self.place) < 0.1)


def write_logs(path, episodes=60):
    """Write what a human's driving might have left: one row per step, and where episodes end."""
    rows, ends = {"observations/place": [], "observations/goal": [], "actions": []}, []
    for seed in range(episodes):
        robot, rng = Robot(seed), np.random.default_rng(seed)
        for _ in range(40):
            seen = robot.see()
            command = np.clip(5 * (seen["goal"] - seen["place"]) + 0.1 * rng.standard_normal(2), -1, 1)
            for key, value in (*((f"observations/{k}", v) for k, v in seen.items()), ("actions", command)):
                rows[key].append(value)
            if robot.drive(command):
                break
        ends.append(len(rows["actions"]))
    np.savez(path, episode_ends=ends, **{key: np.asarray(value, np.float32) for key, value in rows.items()})


def learn(folder, steps):
    """Import the logs, train on them and export the policy."""
    from o2o.data.importers.plan import Options
    from o2o.data.importers.write import import_dataset
    from o2o.runs import session

    # o2o data import logs.npz lab/drive-v0 --success last --root own_data
    done = import_dataset(folder / "logs.npz", "lab/drive-v0", options=Options(success="last"), root=folder)
    print(f"imported {done.episodes} episodes, {done.steps} steps")

    # o2o train bc --dataset own_data/lab/drive-v0 --preset small --config.loss mse --config.actor-lr 1e-3
    #     --offline-steps 1000 --online-steps 0 --name drive
    settings = {"loss": "mse", "actor_lr": 1e-3}
    run = session.preset_run("bc", done.folder, "small", config=settings, offline_steps=steps, online_steps=0)
    session.train(run, folder / "drive")

    # o2o export runs/drive policy.onnx
    for name, taken in session.export_run(folder / "drive", folder / "policy.onnx").items():
        print(f"{name}: an action takes {taken.p50:.3f} ms (p50)")


def act(path, episodes=20):
    """Drive with the exported policy: NumPy and onnxruntime alone."""
    from deploy import Policy  # examples/deploy.py, which you copy to the robot

    policy, reached = Policy(path), 0
    for seed in range(1000, 1000 + episodes):
        robot = Robot(seed)
        policy.reset(seed)
        reached += any(robot.drive(policy.act(robot.see())) for _ in range(40))
    loaded = sorted({"o2o", "jax"} & set(sys.modules))
    print(f"reached {reached} of {episodes} goals, with {loaded or 'neither o2o nor JAX'} loaded")


def main():
    """Do all of it; `--act FILE` drives only, as on the robot's computer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("own_data"), help="new folder for all that is written")
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps")
    parser.add_argument("--act", type=Path, help="an exported policy to drive with")
    given = parser.parse_args()
    if given.act:
        return act(given.act)
    given.out.mkdir(parents=True)
    write_logs(given.out / "logs.npz")
    learn(given.out, given.steps)
    subprocess.run([sys.executable, __file__, "--act", str(given.out / "policy.onnx")], check=True)


if __name__ == "__main__":
    main()
