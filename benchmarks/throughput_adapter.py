"""One agent of one shape for the throughput benchmark: synthetic data, a real environment, and o2o's own loop.

`Adapter` is the one place of the benchmark that knows the loop and its programs.
"""

import ctypes.util
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

if sys.platform == "linux" and not os.environ.get("DISPLAY") and ctypes.util.find_library("OSMesa"):
    os.environ.setdefault("MUJOCO_GL", "osmesa")  # read when MuJoCo is imported

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from throughput_machine import program_flops, seconds

from o2o import envs
from o2o.agents import AGENTS
from o2o.config import LoopConfig
from o2o.data.datasets import Dataset, DatasetInfo, Source
from o2o.data.spaces import ActionMap, ObservationSpec
from o2o.errors import ConfigError
from o2o.train import programs as dispatch
from o2o.train.on_policy import trainer_class
from o2o.types import Phase

NEVER = 10**9
SHAPES = {"pen": ("adroit", "AdroitHandPen-v1"), "cheetah": ("locomotion", "HalfCheetah-v5")}
"""Shape to family of presets and environment: 45 observations and 24 actions, 17 and 6."""
SHAPES["pixels"] = SHAPES["cheetah"]
CAMERA, IMAGE_SIZE = "free", 64
PER_DISPATCH = LoopConfig().updates_per_dispatch


class Still:
    """A base policy that does nothing, for residual agents."""

    def __init__(self, actions: int) -> None:
        """Act with so many zeros."""
        self.action = np.zeros(actions, np.float32)

    def reset(self, seed: int) -> None:
        """Begin an episode."""

    def act(self, observation: Any) -> np.ndarray:
        """Return zeros `[A]`."""
        return self.action


class Noise(gymnasium.ObservationWrapper):
    """Noise in place of a camera, where nothing can be rendered."""

    def __init__(self, env: gymnasium.Env) -> None:
        """Add one camera to flat observations."""
        super().__init__(env)
        self.image = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        camera = gymnasium.spaces.Box(0, 255, self.image.shape, np.uint8)
        self.observation_space = gymnasium.spaces.Dict({"state": env.observation_space, CAMERA: camera})

    def observation(self, observation: Any) -> Any:
        """Return the state with the image."""
        return {"state": observation, CAMERA: self.image}


def make_env(shape: str, needs_base: bool) -> tuple[gymnasium.Env, str]:
    """Return the environment of a shape, and what it lacks."""
    name, note = SHAPES[shape][1], ""
    try:
        env = envs.make(name, cameras=(CAMERA,) if shape == "pixels" else (), image_size=IMAGE_SIZE)
        env.reset(seed=0)
    except ConfigError:
        if shape != "pixels":
            raise
        env, note = Noise(envs.make(name)), "no OpenGL: noise instead of rendered images"
    if needs_base:
        env = envs.BaseAction(env, Still(ActionMap.from_space(env.action_space).dim))
    return env, note


def noise(space: gymnasium.Space, rows: int, rng: np.random.Generator) -> Any:
    """Return random values `[rows, ...]` of a Box or a Dict of them."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {key: noise(part, rows, rng) for key, part in space.spaces.items()}
    assert isinstance(space, gymnasium.spaces.Box)
    if space.dtype == np.uint8:
        return rng.integers(0, 256, (rows, *space.shape), np.uint8)
    values = rng.standard_normal((rows, *space.shape)).astype(np.float32)
    return np.tanh(values) if space.is_bounded() else values


def synthetic(env: gymnasium.Env, rows: int, task: Any) -> Dataset:
    """Return random transitions of an environment's shapes, episodes of 1000 steps, none terminal."""
    rng, ends = np.random.default_rng(0), np.zeros(rows, bool)
    ends[999::1000] = ends[-1] = True
    arrays = {
        "observations": noise(env.observation_space, rows, rng),
        "actions": noise(env.action_space, rows, rng),
        "rewards": rng.standard_normal(rows).astype(np.float32),
        "masks": np.ones(rows, np.float32),
        "next_observations": noise(env.observation_space, rows, rng),
        "ends": ends,
        "mc_returns": rng.standard_normal(rows).astype(np.float32),
    }
    spaces = (env.observation_space, env.action_space)
    about = DatasetInfo(("synthetic",), None, None, None, *spaces, None, None, int(ends.sum()), rows, {})
    spec, actions = ObservationSpec.from_space(spaces[0]), ActionMap.from_space(spaces[1])
    return Dataset(arrays, about, "synthetic", (Source(0, rows, 1.0),), spec, actions, task)


class Recorder:
    """The loop's programs, with the arguments of the last online step remembered."""

    def __init__(self, programs: Any) -> None:
        """Stand in for `programs`."""
        self.programs, self.last = programs, None

    def __getattr__(self, name: str) -> Any:
        """Return the program of this name."""
        return getattr(self.programs, name)

    def online_step(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        self.last = (args, kwargs)
        return self.programs.online_step(state, *args, **kwargs)


class Adapter:
    """An agent on synthetic data and in a real environment, driven through o2o's `Trainer`."""

    def __init__(
        self, name: str, config: Any, shape: str, seeds: int, rows: int, capacity: int = 0, **changes: Any
    ) -> None:
        """Make agents, a dataset of so many rows, room for `capacity` more (0: as many), and environments.

        `changes` are fields of `LoopConfig`.
        """
        kind: Any = AGENTS[name]
        based = kind.preset("other", "small").config.needs.base_policy
        env, self.note = make_env(shape, based)
        loop = LoopConfig(eval_every=NEVER, checkpoint_every=NEVER, eval_episodes=1, replay_capacity=capacity or rows)
        loop = dataclasses.replace(loop, **changes)
        data = synthetic(env, rows, envs.task_for(SHAPES[shape][1]))
        env.close()
        self.config, self.seeds, self.online = config, seeds, config.online
        self.env_fn = lambda _: make_env(shape, based)[0]
        self.trainer = trainer_class(config.online)(kind, config, data, self.env_fn, seeds=seeds, loop=loop)
        setattr(self.trainer, "evaluate", lambda *_, **__: [])  # noqa: B010  # nothing is evaluated
        self.recorder = Recorder(self.trainer.programs)
        if config.online.replay != "rollout":
            self.trainer.programs = self.recorder
        self.phase: Phase | None = None

    def stages(self) -> list[str]:
        """Return the names of the agent's stages of pre-training, one empty one for most."""
        return ["" if phase.update is None else phase.name for phase in self.trainer.agent_of(0).phases(NEVER)]

    def prepare(self, stage: str) -> None:
        """Make the agents ready for a stage."""
        data, phases = self.trainer.offline_data, self.trainer.agent_of(0).phases(NEVER)
        self.phase = next((phase for phase in phases if phase.name == stage), None)
        if self.phase is not None and (enter := self.phase.enter) is not None:
            self.trainer.agent = dispatch.each_seed(lambda agent: enter(agent, data), self.trainer.agent)

    def updates(self, count: int) -> None:
        """Run so many offline updates in one dispatch."""
        t, about = self.trainer, {}
        if self.phase is not None and self.phase.update is not None:
            about = {"phase": self.phase, "begin": jnp.zeros(()), "length": jnp.asarray(float(NEVER))}
        number, size = jnp.asarray(count, jnp.int32), self.config.batch_size
        t.agent, t.rng, _ = t.programs.offline_updates(
            t.agent, t.rng, t.offline_data, number, seeds=self.seeds, batch_size=size, **about
        )
        jax.block_until_ready(t.agent)

    def in_dispatches(self, count: int) -> None:
        """Run so many offline updates as the offline loop does, `PER_DISPATCH` at a time."""
        for begin in range(0, count, PER_DISPATCH):
            self.updates(min(PER_DISPATCH, count - begin))

    def learning(self) -> bool:
        """Whether the online phase has updates at all."""
        return self.online.replay != "none"

    def warm(self) -> tuple[float, float]:
        """Play until the first online update is done, and one step more; return the seconds of these two steps."""
        t = self.trainer
        t.begin_online(t.loop.replay_capacity)
        elapsed = seconds(self.loop, 1)
        while self.learning() and not t.counters.online_updates:  # some agents wait for the end of an episode
            elapsed = seconds(self.loop, 1)
        return elapsed, seconds(self.loop, 1)

    def loop(self, count: int) -> None:
        """Play so many more steps of the whole online loop, of every environment of a seed together."""
        t, together = self.trainer, self.online.num_envs if self.online.replay == "rollout" else 1
        t.online(t.counters.env_steps + count * together)
        assert t.online_state is not None
        jax.block_until_ready(t.online_state.agent)

    def steps(self, count: int) -> None:
        """Run the program of an online step so often, its arguments on the device, its action awaited."""
        t, (args, kwargs) = self.trainer, self.recorder.last or ((), {})
        args = jax.device_put(args)
        for _ in range(count):
            t.online_state, t.action = self.recorder.programs.online_step(t.online_state, *args, **kwargs)
            jax.block_until_ready(t.action)

    def transfers(self, count: int) -> None:
        """Move what a step takes to the device, and actions back, so often."""
        args = [leaf for leaf in jax.tree.leaves((self.recorder.last or ((),))[0]) if isinstance(leaf, np.ndarray)]
        action = np.asarray(self.trainer.action)
        for _ in range(count):
            jax.block_until_ready(jax.device_put(args))
            np.asarray(jax.device_put(action))

    def environments(self) -> Callable[[int], None]:
        """Return what steps as many environments as the loop does, so often, with random actions."""
        assert self.trainer.fleet is not None
        made = [self.env_fn(False) for _ in self.trainer.fleet.slots]
        for env in made:
            env.reset(seed=0)
        action = np.random.default_rng(0).uniform(-1, 1, made[0].action_space.shape or ()).astype(np.float32)

        def run(count: int) -> None:
            for _ in range(count):
                for env in made:
                    _, _, terminated, truncated, _ = env.step(action)
                    if terminated or truncated:
                        env.reset()

        return run

    def traced(self, utd: int) -> tuple[Any, int]:
        """Return the traced update of one seed, and how many updates that is."""
        agent, data, state = self.trainer.agent_of(0), self.trainer.offline_data, self.trainer.online_state
        if self.phase is not None and (step := self.phase.update) is not None:
            return jax.jit(lambda a: step(a, data, jnp.zeros(()))).trace(agent), max(utd, 1)
        if state is not None and self.online.replay == "rollout":
            rounds = agent.rollout_updates
            batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.buffer)
        else:
            rounds = max(utd, 1)
            batch = data.batch_shapes((rounds, self.config.batch_size), agent.needs.window)
        return jax.jit(lambda a, b: a.update(b)).trace(agent, batch), rounds

    def flops(self, utd: int) -> tuple[float, float | None]:
        """Return the matmul FLOPs of one update of one seed, and XLA's count of the program divided alike.

        Of agents some of whose networks step in every second or fifth update only, the mean over updates.
        """
        traced, rounds = self.traced(utd)
        period = getattr(self.config, "policy_delay", getattr(self.config, "balance_every", 1))
        ours, theirs = program_flops(traced, period)
        return ours / rounds, theirs
