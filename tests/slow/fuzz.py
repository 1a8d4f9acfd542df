"""Damage the files of runs and datasets at random, and open them: an error of ours in one line, or the right result.

`python -m tests.slow.fuzz --mutants 20000 --seed 1` tries many; `tests/slow/test_fuzz.py` a few hundred.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from o2o import envs
from o2o.config import LoopConfig
from o2o.data import datasets, recorder
from o2o.envs.pointmaze import EMBEDDED
from o2o.errors import O2OError
from o2o.report.plots import plot_runs
from o2o.report.tables import end
from o2o.runs import session
from o2o.runs.folder import read_status

VALUES = (None, True, False, 0, -1, 7, 2**70, 0.5, -1e308, float("nan"), "", "x", "\ud800", [], [1, "a"], {}, {"a": 1})
"""What takes the place of a value in a JSON file."""


def make_world(folder: Path) -> None:
    """Write `folder/data`, a small dataset, and `folder/run`, a run on it that recorded."""
    recipe = EMBEDDED["pointmaze-umaze"]
    EMBEDDED["pointmaze-umaze"] = dataclasses.replace(recipe, steps=400)
    try:
        made = envs.make_embedded("pointmaze-umaze", folder / "made")
    finally:
        EMBEDDED["pointmaze-umaze"] = recipe
    shutil.move(folder / "made" / made, folder / "data")
    shutil.rmtree(folder / "made")
    run = session.preset_run("bc", str(folder / "data"), "small")
    config = session.with_fields(run.config, [("batch_size", 8), ("actor_hidden_dims", (8,)), ("online.min_rows", 0)])
    loop = LoopConfig(eval_every=300, eval_episodes=1, log_every=50, checkpoint_every=100, updates_per_dispatch=10)
    run = dataclasses.replace(run, config=config, loop=loop, offline_steps=20, online_steps=400, record=True)
    assert session.train(run, folder / "run")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed_bytes(content: bytes, draw: np.random.Generator) -> bytes | None:
    """Return damaged content; None: the file is gone."""
    at, kind = int(draw.integers(len(content) + 1)), int(draw.integers(9))
    other = int(draw.integers(len(content) + 1))
    first, last = min(at, other), max(at, other)
    noise = draw.bytes(int(draw.integers(1, 40)))
    if kind <= 2 and content:  # one bit
        at = min(at, len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1 << int(draw.integers(8))]) + content[at + 1 :]
    return {
        3: content[:at],
        4: content[:first] + content[last:],
        5: content[:last] + content[first:],
        6: content[:at] + noise + content[at + len(noise) :],
        7: b"" if at % 2 else None,
        8: content[:at] + b"\xff\x00\n" + content[at:],
    }.get(kind, noise)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values in JSON."""
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def changed_json(value: Any, draw: np.random.Generator) -> Any:
    """Return JSON with one value replaced, removed or added."""
    value = copy.deepcopy(value)
    known = list(places(value))
    *parents, last = known[int(draw.integers(len(known)))] or (None,)
    new = VALUES[int(draw.integers(len(VALUES)))]
    if last is None:
        return new
    inside = value
    for key in parents:
        inside = inside[key]
    kind = int(draw.integers(8))
    if kind == 0:
        del inside[last]
    elif kind == 1 and isinstance(inside, dict):
        inside["unheard_of"] = new
    else:
        inside[last] = new
    return value


def mutate(name: str, content: bytes, draw: np.random.Generator) -> bytes | None:
    """Return damaged content of a file by its name: half of the JSON stays JSON, with another value."""
    if name.endswith((".json", ".jsonl")) and draw.integers(4):
        lines = content.decode().splitlines() if name.endswith(".jsonl") else [content.decode()]
        at = int(draw.integers(len(lines)))
        value = json.loads(lines[at])
        texts = [key for key in ("env_spec", "eval_env_spec", "observation_space", "action_space") if key in value]
        if texts and draw.integers(2):  # JSON within JSON
            key = texts[int(draw.integers(len(texts)))]
            if isinstance(value[key], str):
                value[key] = json.dumps(changed_json(json.loads(value[key]), draw))
        else:
            value = changed_json(value, draw)
        lines[at] = json.dumps(value)
        return ("\n".join(lines) + "\n").encode()
    return changed_bytes(content, draw)


def quiet(work: Callable[[], Any]) -> Any:
    """Do `work` with nothing on the screen."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work()


DRAWN = {"run/report.html", "run/curve.png"}
"""Files that are drawn from others, and may be drawn again."""


class World:
    """The undamaged files, and what is right."""

    def __init__(self, folder: Path) -> None:
        """Make the files in `folder`."""
        self.folder = folder
        make_world(folder)
        self.files = contents(folder)
        self.data = datasets.load(folder / "data", cache=False)
        self.agents = {}
        for step in sorted(int(path.name) for path in (folder / "run" / "checkpoints").iterdir()):
            self.agents[step] = self._leaves(session.open_run(folder / "run", str(step))[1])
        self.latest = max(self.agents)

    @staticmethod
    def _leaves(trainer: Any) -> list[bytes]:
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trainer.agent.actor.params)]

    def kinds(self) -> dict[str, list[str]]:
        """Return the kinds of files with the files of each."""
        run = [name for name in self.files if name.startswith("run/")]
        kinds = {name: [f"run/{name}"] for name in ("config.json", "metrics.jsonl", "episodes.jsonl", "status.json")}
        kinds["recorded"] = [name for name in run if name.startswith("run/episodes/")]
        latest = f"run/checkpoints/{self.latest}/"
        kinds["checkpoint"] = [name for name in run if name.startswith(latest)]
        kinds["metadata.json"] = ["data/data/metadata.json"]
        kinds["hdf5"] = [name for name in self.files if name.startswith("data/") and name.endswith(".hdf5")]
        return kinds

    def doors(self, kind: str) -> list[Callable[[Path], None]]:
        """Return what opens files of a kind. Each raises an `O2OError`, or `AssertionError` for a wrong result."""
        return {
            "config.json": [self.open],
            "metrics.jsonl": [self.read, self.resume],
            "episodes.jsonl": [self.read, self.resume],
            "status.json": [self.read, self.resume],
            "recorded": [self.export],
            "checkpoint": [self.open, self.resume],
            "metadata.json": [self.load, self.open],
            "hdf5": [self.load, self.open],
        }[kind]

    def open(self, folder: Path) -> None:
        """Open the run: the policy is that of a checkpoint, bit for bit."""
        _, trainer = session.open_run(folder / "run")
        found = self._leaves(trainer)
        trainer.close()
        assert found in self.agents.values(), "another policy"

    def resume(self, folder: Path) -> None:
        """Resume the run, which has ended: nothing sound is lost."""
        before = contents(folder)
        assert session.resume(folder / "run")
        after = contents(folder)
        for step in self.agents:
            for name in [name for name in before if name.startswith(f"run/checkpoints/{step}/")]:
                kept = (after.get(name), after.get(name.replace("/checkpoints/", "/damaged/")))
                assert before[name] in kept, f"{name} is lost"
        self.open(folder)

    def read(self, folder: Path) -> None:
        """Read the rows: the table at a run's end, and its plot."""
        from rich.console import Console

        end(folder / "run", read_status(folder / "run") == "finished", Console(file=io.StringIO()))
        plot_runs([folder / "run"], folder / "plot.png", None)
        (folder / "plot.png").unlink()

    def export(self, folder: Path) -> None:
        """Export the recorded episodes."""
        kept = contents(folder / "run" / "recorded")
        try:
            recorder.export(folder / "run")
        except O2OError:
            assert contents(folder / "run" / "recorded") == kept, "the earlier export is lost"
            raise

    def load(self, folder: Path) -> None:
        """Load the dataset and make its environment."""
        datasets.check(folder / "data")
        about = datasets.info(folder / "data")
        data = datasets.load(folder / "data", cache=False)
        assert data.size and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(data.arrays)), "not finite"
        env = envs.make(about)
        env.reset(seed=0)
        env.close()


def fuzz(world: World, mutants: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Open `mutants` damaged worlds; return how often what came, and a line or a traceback for each fault."""
    draw, outcomes, faults = np.random.default_rng(seed), Counter[str](), list[str]()
    kinds = world.kinds()
    for number in range(mutants):
        kind = list(kinds)[number % len(kinds)]
        name = kinds[kind][int(draw.integers(len(kinds[kind])))]
        content = mutate(name, world.files[name], draw)
        if content == world.files[name]:
            continue
        doors = world.doors(kind)
        outcome = attempt(world, doors[int(draw.integers(len(doors)))], name, content)
        outcomes[f"{kind}: {outcome.partition(chr(10))[0].partition(':')[0]}"] += 1
        if outcome.startswith("fault"):
            faults.append(f"mutant {number} of seed {seed}, {name}: {outcome}")
    return outcomes, faults


def attempt(world: World, door: Callable[[Path], None], name: str, content: bytes | None) -> str:
    """Put `content` in place of a file, go through a door, and say what came; then put all back as it was."""
    path = world.folder / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    before = contents(world.folder)
    try:
        quiet(lambda: door(world.folder))
        outcome = "right"
    except O2OError as error:
        outcome = "refused" if "\n" not in str(error) else f"fault: several lines: {error}"
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-3:]
        outcome = f"fault: {door.__name__}: {type(error).__name__}: {error} at {[(f.name, f.lineno) for f in last]}"
    after = contents(world.folder)
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)} - DRAWN
    if outcome != "right" and door not in (world.resume, world.export) and changed:
        outcome = f"fault: {sorted(changed)} changed"
    restore(world, after)
    return outcome


def restore(world: World, now: dict[str, bytes]) -> None:
    """Put the files of the world back as they were."""
    for name in now.keys() - world.files.keys():
        (world.folder / name).unlink()
    for name, content in world.files.items():
        if now.get(name) != content:
            (world.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (world.folder / name).write_bytes(content)
    for path in sorted(world.folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def main() -> int:
    """Fuzz from the command line; exit 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, faults = fuzz(World(Path(folder)), given.mutants, given.seed)
    print("\n".join(f"{count:6} {outcome}" for outcome, count in sorted(outcomes.items())))
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
