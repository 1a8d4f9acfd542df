"""One run on several devices: the numbers of one device, and arrays that really lie in parts."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from o2o.config import RunConfig, to_dict, with_fields
from o2o.errors import ConfigError
from o2o.runs import session

CODE = """
import dataclasses, json, sys
import jax, numpy as np
from o2o.runs import session

def trained(config, devices):
    run = dataclasses.replace(config, loop=dataclasses.replace(config.loop, devices=devices))
    trainer = session.build(run)
    assert trainer.offline(run.offline_steps) and trainer.online(run.online_steps)
    return trainer

def numbers(tree):
    keys = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(l) if keys(l) else l, np.float64) for l in jax.tree.leaves(tree)]

found = []
for text in open(sys.argv[1]):
    config = session.settings_of(json.loads(text), "test")
    one, four = trained(config, 1), trained(config, 4)
    trees = [(t.agent.actor.params, t.agent.critic.params, t.replay.arrays()) for t in (one, four)]
    leaf = jax.tree.leaves(four.agent.actor.params)[0]
    found.append({
        "apart": max(float(np.abs(a - b).max()) for a, b in zip(*map(numbers, trees), strict=True)),
        "devices": len(leaf.sharding.device_set),
        "part": leaf.addressable_shards[0].data.shape[0],
        "updates": [one.counters.gradient_steps, four.counters.gradient_steps],
    })
print(json.dumps(found))
"""


def test_four_devices_are_one(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """On four devices (forced on the host) the numbers are those of one: two seeds, and two halves of each minibatch.

    Before and after the switch; the environments are inside the program.
    """
    run = tiny_run("iql", (("online.num_envs", 2),), seeds=2, offline_steps=6, online_steps=20)
    run = dataclasses.replace(run, env="jax/PointMaze_UMaze-v0", episode_limit=9)
    runs = [with_fields(run, [("loop.eval_every", 0), ("loop.eval_envs", 1)])]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(to_dict(run)) + "\n" for run in runs))
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": root}
    ended = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (found,) = json.loads(ended.stdout.splitlines()[-1])
    assert (found["devices"], found["part"]) == (4, 1)
    assert found["apart"] < 1e-4, found
    assert found["updates"][0] == found["updates"][1] > 6


def test_bad_devices_refused(tiny_run: Callable[..., RunConfig]) -> None:
    """More devices than there are is one line."""
    run = tiny_run("iql")
    with pytest.raises(ConfigError, match=r"loop.devices is 64, and JAX has \d+ \(cpu\)"):
        session.build(dataclasses.replace(run, loop=dataclasses.replace(run.loop, devices=64)))
