"""Observations in host memory: the same draws, the same updates, bit for bit, whatever the prefetch thread does."""

import dataclasses
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from o2o.config import LoopConfig
from o2o.data.normalizer import Normalizer
from o2o.errors import CheckpointError, ConfigError, RunError
from o2o.replay.buffer import OfflineData
from o2o.replay.device import Returns
from o2o.replay.host import HostData, HostReplay
from o2o.replay.place import Place, row_bytes
from o2o.replay.row_store import ON_HOST, RowStore
from o2o.replay.source import Sampling
from o2o.runs import session
from o2o.train import checkpoint, programs
from o2o.types import Agent, AgentConfig, Needs

ROWS, BATCH, CAPACITY = 30, 4, 12


@dataclasses.dataclass(frozen=True)
class ToyConfig(AgentConfig):
    batch_size: int = BATCH


class Toy(Agent):
    """Remembers what it was shown: a weighted sum of every leaf of every batch, in order."""

    memory: jax.Array
    window: int = struct.field(pytree_node=False, default=1)
    keys: tuple[str, ...] = struct.field(pytree_node=False, default=())
    config: ToyConfig = struct.field(pytree_node=False, default=ToyConfig())

    @property
    def needs(self):
        return Needs(self.keys, self.window)

    def update(self, batch):
        memory = 0.9 * self.memory
        valid = batch["valid"] if self.window > 1 else jnp.ones_like(batch["rewards"])
        for i, leaf in enumerate(jax.tree.leaves(batch)):
            leaf = leaf * valid.reshape(valid.shape + (1,) * (leaf.ndim - valid.ndim))
            weights = jnp.cos(jnp.arange(leaf.size) + i).reshape(leaf.shape)
            memory = memory + jnp.sum(leaf.astype(jnp.float32) * weights)
        return self.replace(memory=memory), {"toy/memory": memory}

    def sample_actions(self, observations, carry, rng, deterministic=False):
        seen = jnp.mean(observations["camera"].astype(jnp.float32), axis=(1, 2, 3))[:, None] / 255.0
        return jnp.tanh(seen + 0.01 * self.memory + jax.random.normal(rng, (len(seen), 2))), carry


def rows_of(count, seed=0, ends=7):
    rng = np.random.default_rng(seed)
    observe = lambda: {  # noqa: E731
        "state": rng.normal(size=(count, 3)).astype(np.float32),
        "camera": rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8),
    }
    return {
        "observations": observe(),
        "actions": rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        "rewards": rng.normal(size=count).astype(np.float32),
        "masks": np.ones(count, np.float32),
        "next_observations": observe(),
        "mc_returns": np.zeros(count, np.float32),
        "ends": (np.arange(count) % ends == ends - 1),
    }


SOURCES = [(0, 10, 0.7), (10, 20, 0.3)]


def equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(left, right)


def agents(seeds, **fields):
    return Toy(memory=jnp.zeros(seeds), **fields)


@pytest.mark.parametrize("window", [1, 3])
def test_host_dataset_draws(window):
    """A dataset on the host is drawn as on the device."""
    rows = rows_of(ROWS)
    device, host = (kind.create(rows, ("ends",), SOURCES) for kind in (OfflineData, HostData))
    for seed in range(3):
        wanted = device.draw(jax.random.key(seed), (2, 5), window)
        light = host.light.draw(jax.random.key(seed), (2, 5), window)
        assert light["observations"].shape == wanted["rewards"].shape
        equal({**light, **host.read(np.asarray(light["observations"]))}, wanted)
    sampling = Sampling(5, 2, window=window)
    shapes = [replay.batch_shapes(sampling) for replay in replays(rows, ("ends",), 1)]
    assert shapes[0] == shapes[1] == jax.eval_shape(lambda: wanted)
    again = HostData.take(device)
    equal(again.light, host.light)
    equal(again.heavy, host.heavy)
    assert host.size == ROWS and host.rows["observations"]["camera"] is rows["observations"]["camera"]


def test_device_holds_no_observation():
    """The device holds no observation."""
    host = HostData.create(rows_of(ROWS), ("ends",))
    assert row_bytes(host.light.rows) < 40
    assert row_bytes(host.rows) > 2 * 4 * 4 * 3


def replays(rows, keys, seeds, most=CAPACITY):
    """Return two replays of a dataset: on the device, and with its observations in host memory."""
    places = (Place(device_bytes, most) for device_bytes in (2**30, 0))
    return [place.dataset(rows, keys, SOURCES, seeds) for place in places]


def keys_of(seeds):
    return jax.random.split(jax.random.key(1), seeds)


@pytest.mark.parametrize(("seeds", "window"), [(1, 1), (2, 3)])
def test_offline_updates_match(seeds, window):
    """Offline updates are the same from the host as from the device."""
    found, sampling = [], Sampling(BATCH, window=window)
    for replay in replays(rows_of(ROWS), ("ends",), seeds):
        agent, totals, at = agents(seeds, window=window), {"toy/memory": jnp.zeros(seeds)}, 0
        for source, count in replay.dataset(keys_of(seeds), 0, 5, sampling):
            agent, totals = programs.updates(agent, totals, source, keys_of(seeds), at, count, sampling=sampling)
            at += count
        assert at == 5
        found.append((agent, totals))
        replay.close()
    equal(*found)
    assert np.abs(found[0][0].memory).min() > 0


def play(
    replay, *, seeds=1, steps=24, window=1, kind="mixed", pending=False, normalizer=None, initial=0, overlap=False
):
    """Drive the programs through a made-up environment and return all that they gave."""
    needs, keys = ("mc_returns",) if pending else (), keys_of(seeds)
    agent, carry, totals = agents(seeds, window=window, keys=needs), None, {"toy/memory": jnp.zeros(seeds)}
    replay.begin(needs, CAPACITY, kind, Returns(0.9, None) if pending else None)
    world = rows_of(steps * seeds, seed=5, ends=6)
    del world["mc_returns"]
    world = jax.tree.map(lambda leaf: leaf.reshape(steps, seeds, *leaf.shape[1:]), world)
    sampling = Sampling(BATCH, 2, 0.5 if kind == "mixed" else 0.0, window)
    states, at = [], 0
    for step in range(steps):
        rows = jax.tree.map(lambda leaf, s=step: leaf[s], world)
        ended = rows["ends"] > 0
        rows["ends"] = rows["ends"].astype(np.float32)
        update = step >= 6
        if step == 6 and initial:
            single = sampling._replace(utd_ratio=1)
            for source, count in replay.burst(keys, at, initial, single):
                agent, totals = programs.updates(agent, totals, source, keys, at, count, sampling=single)
                at += count
        replay.add(rows, normalizer)
        source = replay.source(keys, at, sampling) if update else None
        seen = jax.tree.map(lambda leaf: leaf[:, None], rows["next_observations"])
        agent, totals, carry, action, _ = programs.learn_and_act(
            agent, totals, carry, None if overlap else source, normalizer, keys, at, seen, ended[:, None], step + 1,
            sampling=sampling, action_dim=2, random=not update,
        )  # fmt: skip
        if overlap and source is not None:
            agent, totals, _ = programs.learn(agent, totals, source, keys, at, sampling=sampling)
        at += 2 * update
        replay.reveal(ended)
        states.append(jax.tree.map(np.asarray, (agent.memory, action, totals)))
    return states


CASES = {
    "mixed, normalised, with first updates": {"initial": 4, "normalizer": True},
    "windows of two seeds": {"kind": "online", "window": 3, "seeds": 2},
    "append": {"kind": "append"},
    "learning while environments step": {"overlap": True},
    "waiting for returns": {"pending": True},
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_online_steps_match_bitwise(case):
    """Online steps are the same bit for bit."""
    rows, options = rows_of(ROWS), dict(CASES[case])
    needs = ("mc_returns", "ends")
    if options.pop("normalizer", False):
        options["normalizer"] = Normalizer.fit(rows["observations"])
    device, host = replays(rows, needs, options.get("seeds", 1))
    wanted, got = play(device, **options), play(host, **options)
    for step, (one, two) in enumerate(zip(got, wanted, strict=True)):
        for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_array_equal(left, right, err_msg=f"step {step}")
    assert np.abs(got[-1][0]).max() > 0
    host.close()


def test_rows_read_ahead(monkeypatch):
    """The rows read ahead are mostly right, and their timing does not matter."""
    read, calls, rng = RowStore.read, [], np.random.default_rng(0)

    def slow(store, handles, dataset, until):
        calls.append((handles.shape, until == store.total))
        time.sleep(rng.uniform(0, 0.01))
        return read(store, handles, dataset, until)

    plain, late = (replays(rows_of(ROWS), ("ends",), 1)[1] for _ in range(2))
    assert isinstance(plain, HostReplay)
    wanted = play(plain)
    plain.close()  # its thread may still be reading
    monkeypatch.setattr(RowStore, "read", slow)
    got = play(late)
    for one, two in zip(got, wanted, strict=True):
        equal(one, two)
    whole = [shape for shape, _ in calls if len(shape) == 3]
    assert len(whole) in (18, 19)  # one for each of 18 updates, perhaps one ahead of the last; none was fetched anew
    late.close()


def example(seeds=2):
    rows = rows_of(3)
    return jax.tree.map(lambda leaf: leaf[:seeds], {key: rows[key] for key in ON_HOST})


def test_store_round_trip(tmp_path):
    """A store gives back to each seed what it was given."""
    store = RowStore(tmp_path / "replay", example(), 3, 2)
    world = [rows_of(2, seed=i) for i in range(5)]
    handles = [store.add(rows) for rows in world]
    np.testing.assert_array_equal(handles, [[i, i] for i in range(5)])
    asked = np.asarray([[4, 0, -2], [3, 4, -1]], np.int32)
    data = rows_of(6, seed=9)
    got = store.read(asked, data, store.total)
    for key in ("observations", "next_observations"):
        for part in ("state", "camera"):
            for seed, row in np.ndindex(2, 3):
                handle = asked[seed, row]
                wanted = data[key][part][-1 - handle] if handle < 0 else world[handle][key][part][seed]
                np.testing.assert_array_equal(got[key][part][seed, row], wanted)
    assert got["observations"]["camera"].dtype == np.uint8


def test_files_of_killed_run(tmp_path):
    """Files of a killed run are used again, and lost rows are refused."""
    store = RowStore(tmp_path, example(), 3, 2)
    world = [rows_of(2, seed=i) for i in range(9)]
    for rows in world[:7]:
        store.add(rows)
    again = RowStore(tmp_path, example(), 3, 2)
    again.total = 5  # a checkpoint behind which two rows were written
    got = again.read(np.asarray([[2, 3, 4]] * 2), rows_of(1), again.total)
    for i, row in enumerate((2, 3, 4)):
        np.testing.assert_array_equal(got["observations"]["camera"][1, i], world[row]["observations"]["camera"][1])
    with pytest.raises(CheckpointError, match="resume from the latest"):
        again.read(np.asarray([[1, 3]] * 2), rows_of(1), again.total)
    with pytest.raises(RunError, match=r"room for 5 transitions, expected 10: .*checkpoint_every"):
        RowStore(tmp_path, example(), 8, 2)
    kept = RowStore(tmp_path, example(), 3, 2).read(np.asarray([[4]] * 2), rows_of(1), 5)
    np.testing.assert_array_equal(kept["observations"]["camera"][0, 0], world[4]["observations"]["camera"][0])


def test_rows_synced_before_checkpoint(tiny_run, tmp_path, monkeypatch):
    """What a checkpoint refers to is on the disk before it."""
    done, written, fsync, save = [], [], os.fsync, checkpoint.save

    def syncing(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def saving(folder, step, *rest):
        before = [*done, step]
        save(folder, step, *rest)
        files = {path.name for path in (folder / str(step)).rglob("*")}
        written.append(files and {*files, str(step), "checkpoints"} <= set(done[len(before) - 1 :]))
        done[:] = before  # without what the checkpoint itself writes

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(checkpoint, "save", saving)
    loop = LoopConfig(eval_every=0, eval_episodes=1, checkpoint_every=20, updates_per_dispatch=10, device_bytes=0)
    assert session.train(tiny_run("wsrl", offline_steps=10, online_steps=40, loop=loop), tmp_path / "run")
    steps = [at for at, name in enumerate(done) if isinstance(name, int)]
    assert {done[at] for at in steps} == {10, 30, 50} and written == [True] * 3
    rows = ["metrics.jsonl", "episodes.jsonl", "next_observations.bin", "observations.bin", "serials.bin"]
    assert all(done[at - 5 : at] == rows for at in steps if done[at] > 10)


def test_small_disk_refused(tmp_path):
    """Too small a disk is refused before any step."""
    with pytest.raises(ConfigError, match=r"needs .* GiB in .*replay_capacity"):
        RowStore(tmp_path, example(), 10**13, 1)


def test_temporary_store_cleanup():
    """A temporary store removes its files."""
    store = RowStore(None, example(), 3, 1)
    folder = store.folder
    assert folder.is_dir()
    del store
    assert not folder.exists()


def test_device_limit():
    """The limit is the given one, or what the back end suggests."""
    assert Place(0).limit() == 0 and Place(5).limit() == 5
    assert Place().limit() >= 2**30


def test_viewed_run_keeps_rows(tiny_run, tmp_path):
    """A run that is only looked at keeps its rows."""
    loop = LoopConfig(eval_every=0, eval_episodes=1, updates_per_dispatch=10, device_bytes=0)
    assert session.train(tiny_run("wsrl", offline_steps=10, online_steps=40, loop=loop), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run/replay").iterdir()}
    files = lambda: {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}  # noqa: E731
    times = files()
    _, trainer = session.open_run(tmp_path / "run")
    session.load_policy(tmp_path / "run")
    assert files() == times, "who only looks needs no right to write"
    with pytest.raises(RunError, match="opened to be looked at.*o2o resume"):
        trainer.online(60)
    trainer.close()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run/replay").iterdir()} == before
