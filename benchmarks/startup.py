"""How long until something happens: importing, the first update, loading a large dataset; and images from disk.

    python benchmarks/startup.py [import] [first-update] [data] [images]

Each part runs in processes of its own and replaces its rows in `benchmarks/results/startup/`. `data` and `images` need
about 5 GB of disk in the folder for temporary files (`TMPDIR`), for as long as they run.
"""

import dataclasses
import gc
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from parts import measure_parts, process_megabytes, process_peak

AGENTS = ("rlpd", "calql", "qc", "residual", "uni_o4", "expo")
STEPS, EPISODE = 1_000_000, 1_000
IMAGES, KEPT, IMAGE_STEPS, ROUNDS = 100_000, 2_000, 10, 5


def child(task: str, **about: Any) -> dict[str, Any]:
    """Run a task in a process of its own and return what it prints."""
    message = json.dumps({**about, "spawned": time.time()})
    done = subprocess.run([sys.executable, __file__, "--child", task, message], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.decode().splitlines()[-1])


def importing(spawned: float) -> dict[str, Any]:
    """Import the agents; return the seconds, and whether a JAX back end was started."""
    started = time.perf_counter()
    import o2o.agents  # noqa: F401, PLC0415

    elapsed = time.perf_counter() - started
    from jax._src import xla_bridge  # noqa: PLC0415

    return {"seconds": elapsed, "process": time.time() - spawned, "backends": len(xla_bridge._backends)}


def first_updates(spawned: float, agent: str) -> dict[str, Any]:
    """Make an agent of paper size, update it once offline, then play until it has learnt online."""
    from throughput_adapter import Adapter  # noqa: PLC0415
    from throughput_agents import config_of  # noqa: PLC0415

    adapter = Adapter(agent, config_of(agent, "pen", 0, False), "pen", 1, 5_000)
    ready = time.time() - spawned
    adapter.prepare(adapter.stages()[0])
    adapter.updates(1)
    offline, begun = time.time() - spawned, time.time()
    trainer = adapter.trainer
    trainer.begin_online(trainer.loop.replay_capacity)
    while not trainer.counters.online_updates:
        adapter.loop(1)
    return {"ready": ready, "offline": offline, "online": time.time() - begun, "memory": process_peak()}


def write_million(spawned: float, root: str) -> dict[str, Any]:
    """Write a Minari dataset of a million steps."""
    import numpy as np  # noqa: PLC0415
    from gymnasium import spaces  # noqa: PLC0415

    from o2o.data.datasets import Episode, write  # noqa: PLC0415

    rng, last = np.random.default_rng(0), np.arange(EPISODE) == EPISODE - 1

    def episode() -> Episode:
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        return Episode(draw(EPISODE + 1, 17), np.tanh(draw(EPISODE, 6)), draw(EPISODE), last & False, last)

    box = lambda bound, size: spaces.Box(-bound, bound, (size,), np.float32)  # noqa: E731
    episodes = (episode() for _ in range(STEPS // EPISODE))
    write("bench/million-v0", episodes, observation_space=box(np.inf, 17), action_space=box(1.0, 6), spec=None,
                  root=root)  # fmt: skip
    return {"seconds": time.time() - spawned}


def load_million(spawned: float, root: str) -> dict[str, Any]:
    """Load it, through the cache in `O2O_CACHE`."""
    from o2o.data import datasets  # noqa: PLC0415

    before, own = process_peak(), process_megabytes("RssAnon") or 0.0
    started = time.perf_counter()
    data = datasets.load("bench/million-v0", root=root)
    elapsed = time.perf_counter() - started
    gc.collect()
    arrays = sum(array.nbytes for array in data.arrays.values()) / 1e6
    return {
        "seconds": elapsed,
        "arrays": arrays,
        "peak": process_peak() - before,
        "kept": (process_megabytes("RssAnon") or 0.0) - own,
        "steps": data.size,
        "process": time.time() - spawned,
    }


def images(spawned: float) -> dict[str, Any]:
    """Compare updates on a replay of images in files with updates on few images on the device, in turns."""
    from throughput_adapter import Adapter  # noqa: PLC0415
    from throughput_agents import config_of  # noqa: PLC0415

    from o2o.agents import Residual  # noqa: PLC0415

    online = config_of("residual", "pixels", 4, False).online
    config = dataclasses.replace(Residual.preset("locomotion", "small").config, online=online)
    device = Adapter("residual", config, "pixels", 1, KEPT)
    host = Adapter("residual", config, "pixels", 1, KEPT, IMAGES, device_bytes=0, checkpoint_every=10_000)
    for adapter in (device, host):
        adapter.trainer.programs = adapter.recorder.programs  # as it runs, with nothing in between
        adapter.warm()
    files = fill(host.trainer, IMAGES)
    rates: dict[str, list[float]] = {"device": [], "files": [], "cold": []}
    stayed = []
    for _ in range(ROUNDS):
        for name, adapter in (("device", device), ("files", host), ("cold", host)):
            if name == "cold":
                host.trainer.programs.sync()  # what is not on the disk yet stays in memory
                forget(files)
                stayed.append(resident(files))
            started = time.perf_counter()
            adapter.loop(IMAGE_STEPS)
            rates[name].append(4 * IMAGE_STEPS / (time.perf_counter() - started))
    about = {"megabytes": sum(array.nbytes for array in files) / 1e6, "rows": IMAGES, "resident": stayed}
    return {"rates": rates, **about, "process": time.time() - spawned}


def fill(trainer: Any, rows: int) -> list[Any]:
    """Put so many rows of the dataset, again and again, into a replay on disk; return its mapped files."""
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from o2o.replay.row_store import ON_HOST  # noqa: PLC0415

    store, state, data = trainer.programs.store, trainer.online_state, trainer.offline_data
    each = [jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], data.heavy) for n in range(data.size)]
    handles = np.concatenate([store.add(each[n % data.size]) for n in range(rows)])
    light = {key: np.asarray(data.light.rows[key])[np.arange(rows) % data.size] for key in state.buffer.rows}
    light |= dict.fromkeys(ON_HOST, handles)
    buffer = jax.vmap(lambda ring, new: ring.extend(new))(state.buffer, {key: new[None] for key, new in light.items()})
    trainer.online_state = state._replace(buffer=buffer)
    return [mapped for mapped, _ in store._maps]


def forget(mapped: Sequence[Any]) -> None:
    """Let the system drop what it keeps in memory of the files behind `np.memmap`s."""
    for array in mapped:
        array.base.madvise(mmap.MADV_DONTNEED)  # it keeps the pages that a process has in its tables
        descriptor = os.open(array.filename, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident(mapped: Sequence[Any]) -> float:
    """Return the share of these files' pages that the system keeps in memory."""
    import ctypes  # noqa: PLC0415

    library, kept, pages = ctypes.CDLL(None, use_errno=True), 0, 0
    for array in mapped:
        found = (ctypes.c_ubyte * -(-array.nbytes // mmap.PAGESIZE))()
        if library.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), found):
            raise OSError(ctypes.get_errno(), "mincore")
        kept, pages = kept + sum(flag & 1 for flag in found), pages + len(found)
    return kept / pages


TASKS = {"import": importing, "first": first_updates, "write": write_million, "load": load_million, "images": images}


def measure_import() -> list[dict[str, Any]]:
    """Import several times."""
    return [child("import") for _ in range(ROUNDS)]


def measure_first() -> list[dict[str, Any]]:
    """Start every agent with an empty cache of programs, then again."""
    found = []
    for agent in AGENTS:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
            for which in ("nothing kept", "second start"):
                found.append({"agent": agent, "start": which, **child("first", agent=agent)})
                print(found[-1], flush=True)
    return found


def measure_data() -> list[dict[str, Any]]:
    """Write and load a large dataset: twice, the second time through the cache, and once more."""
    with tempfile.TemporaryDirectory() as root:
        os.environ["O2O_CACHE"] = f"{root}/cache"
        child("write", root=root)
        found = [{"load": name, **child("load", root=root)} for name in ("first", "second", "third")]
    del os.environ["O2O_CACHE"]
    return found


def measure_images() -> list[dict[str, Any]]:
    """Train on images in files."""
    return [child("images")]


PARTS = {"import": measure_import, "first-update": measure_first, "data": measure_data, "images": measure_images}


def spread(values: list[float]) -> str:
    """Return the median, and the least and the most."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} - {max(values):.3g})"


def report(rows: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    lines = [
        "# Start-up and data", "",
        "Made by `python benchmarks/startup.py`; raw: `rows.json`. Medians, least and most in parentheses, but for "
        "what was measured once.",
        f"Machine: {rows['machine']}.", "",
    ]  # fmt: skip
    if "import" in rows:
        each = rows["import"]
        started = max(row["backends"] for row in each)
        lines += [
            f"`import o2o.agents`: {spread([row['seconds'] for row in each])} s, {started} JAX back ends started by it;"
            f" {spread([row['process'] for row in each])} s from the start of the process.", "",
        ]  # fmt: skip
    if "first-update" in rows:
        lines += [
            "## Seconds to the first update, measured once", "",
            "Agents of paper size, 45 observations and 24 actions, from the start of the process. `online`: from the "
            "switch to the end of the first online update, environment and compilation included. The command line "
            "keeps compiled programs, so `second start` is what its user sees from then on.", "",
            "| agent | | agent and data ready | first offline update | online: first update | peak MB |",
            "| --- | --- | --: | --: | --: | --: |",
        ]  # fmt: skip
        for row in rows["first-update"]:
            times = " | ".join(f"{row[key]:.1f}" for key in ("ready", "offline", "online"))
            lines.append(f"| {row['agent']} | {row['start']} | {times} | {row['memory']:.0f} |")
        lines.append("")
    if "data" in rows:
        lines += [
            "## Loading a dataset of 1,000,000 steps, measured once", "",
            "17 observations, 6 actions, episodes of 1000 steps. `kept`: growth of the process's own memory; "
            "`peak`: of its peak memory, with the pages of the cache's files that were read.", "",
            "| load | seconds | arrays, MB | kept, MB | peak, MB |", "| --- | --: | --: | --: | --: |",
        ]  # fmt: skip
        for row in rows["data"]:
            sizes = " | ".join(f"{row[key]:.0f}" for key in ("arrays", "kept", "peak"))
            lines.append(f"| {row['load']} | {row['seconds']:.2f} | {sizes} |")
        lines.append("")
    if "images" in rows:
        row, rates = rows["images"][0], rows["images"][0]["rates"]
        stayed = f"up to {max(row['resident']):.1%} of their pages stayed" if "resident" in row else "not checked"
        cold = f"in files that the system was told to drop from memory ({stayed})"
        ratio = lambda name: spread([a / b for a, b in zip(rates[name], rates["device"], strict=True)])  # noqa: E731
        lines += [
            "## Images from disk", "",
            f"`residual` (small networks, UTD 4, one camera of 64 x 64 x 3), the whole online loop. "
            f"A replay of {row['rows']:,} rows in files of {row['megabytes']:.0f} MB, the other half of a minibatch "
            f"from a dataset of {KEPT:,} rows in memory, against a replay of {KEPT:,} on the device, in turns, "
            f"{ROUNDS} rounds:", "",
            "| | updates/s | ratio to the device |", "| --- | --: | --: |",
            f"| on the device | {spread(rates['device'])} | 1 |",
            f"| in files | {spread(rates['files'])} | {ratio('files')} |",
            f"| {cold} | {spread(rates['cold'])} | {ratio('cold')} |", "",
        ]  # fmt: skip
    return "\n".join(lines)


def main(args: list[str]) -> int:
    """Measure the parts that are named, all where none is; or be the process of one."""
    if args and args[0] == "--child":
        print(json.dumps(TASKS[args[1]](**json.loads(args[2]))))
        return 0
    return measure_parts(args, PARTS, report, "startup")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
