"""How fast our agents learn and play, through the public doors of o2o: `session.build`, `Trainer.offline`, `.online`.

    python benchmarks/throughput.py [--again] [--smoke] [--out FOLDER] [--together N] [PATTERN ...]
    python benchmarks/throughput.py --against CHECKOUT [PATTERN ...]
    python benchmarks/throughput.py --seeds-pay [--smoke] [--out FOLDER] [AGENT ...]

A case is AGENT/SHAPE/SEEDS/FORM, such as `iql/pen/1/offline`; a PATTERN selects cases (`'iql/*'`, `'*/1/utd1'`).
Shapes: `pen` (45 observations, 24 actions), `cheetah` (17 and 6), `pixels` (a camera of 64 x 64 x 3 besides), `scene`
(OGBench's, 40 and 5, for agents with published settings there; needs the package ogbench). Forms:

    offline   gradient steps per second of pre-training, drawing the minibatches included
    utdN      environment steps per second of the whole online loop, with N updates each
    utdNxE    the same with E environments per seed, and N updates for each step of all of them
    online    the same for agents that learn from roll-outs, or that do not learn online
    act       environment steps per second of an evaluation: the policy acts, the environment steps
    insert    environment steps per second of the online loop with random actions, stored, and no update

Each case runs in a process of its own, on random data and in a real environment. A rate is steps by seconds without the
evaluation that ends each call, and of all seeds together. The first call, which compiles, does not count.

Rates go to `benchmarks/results/rates/`, row by row; a case that has a row is left out unless `--again`. `--together N`
starts N processes at a time, which compile side by side and are then measured one after the other: for a machine with
many cores and a GPU. `--smoke` measures a few tiny cases into `runs/rates-smoke`: it shows that all works, its figures
mean nothing. `--against` runs each case with the code of this checkout and with that of CHECKOUT, in turns, and prints
the ratio of the rates. `--seeds-pay` measures what 1, 2 and 4 seeds in one program cost at OGBench's sizes, in turns,
into `benchmarks/results/seeds_pay/`; an agent that is measured anew replaces its rows. Run it alone on the machine.
"""

import argparse
import csv
import dataclasses
import fnmatch
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
RATES, SMOKE_RATES = HERE / "results" / "rates", CHECKOUT / "runs" / "rates-smoke"
NEVER = 10**9
SHAPES = {"pen": ("AdroitHandPen-v1", 45, 24), "cheetah": ("HalfCheetah-v5", 17, 6)}
SHAPES["pixels"] = SHAPES["cheetah"]
SHAPES["scene"] = ("ogbench:scene-singletask-task1-v0", 40, 5)
DATASETS = {shape: f"bench/{shape}-v0" for shape in SHAPES} | {"scene": "bench/scene-play-v0"}
"""Names of the random datasets. OGBench's presets are chosen by words in them."""
IMAGE_SIZE, EPISODE_STEPS = 64, 100
SEEDS, PAY_SEEDS = (1, 5, 10), (1, 2, 4)
AGAINST = (
    "iql/pen/1/offline", "iql/pen/5/offline", "cql/pen/1/offline", "td3bc/cheetah/1/offline", "wsrl/pen/1/offline",
    "uni_o4/cheetah/1/offline", "rlpd/pen/1/utd1", "rlpd/pen/1/utd20", "sac/cheetah/1/utd1", "sac/cheetah/1/insert",
    "sac/cheetah/1/act", "sac/cheetah/5/utd1", "qc/pen/1/act", "ppo/cheetah/1/online",
)  # fmt: skip
"""Cases of `--against` without a pattern."""
SMOKE = ("iql/pen/1/offline", "bc/cheetah/1/act", "sac/cheetah/5/utd1", "sac/cheetah/1/insert", "ppo/cheetah/1/online")
ON_GPU = (
    *(f"{agent}/scene/1/offline" for agent in ("ifql", "fql", "rebrac", "expo", "qam", "dsrl")),
    "ifql/scene/2/offline", "ifql/scene/4/offline", "qam/scene/4/offline", "iql/pen/1/offline", "cql/pen/1/offline",
    "rlpd/pen/1/utd1", "rlpd/pen/1/utd20", "iql/pen/5/offline", "sac/cheetah/1/utd1", "sac/cheetah/5/utd1",
    "td3bc/cheetah/1/offline", "wsrl/pen/1/offline", "qc/pen/1/act", "ppo/cheetah/1/online",
)  # fmt: skip
"""Cases for a GPU that is at hand for minutes only, the most wanted first (`--on-gpu`)."""
COLUMNS = ("device", "case", "unit", "per_second", "least", "most", "first_call_s", "peak_mb", "matmul_gflops")
COLUMNS = (*COLUMNS, "jax", "commit", "date")
PAY_COLUMNS = ("device", "agent", "seeds", "updates_per_second", "rates", "jax", "commit", "date")
REPEATS, SECONDS, SMOKE_SECONDS, PAUSE = 5, 3.0, 0.1, 0.3
PAY_SECONDS = 10.0
"""On two cores an update of four seeds takes 1 to 4 s."""
ANSWER_SECONDS = 3600.0
"""A process that says nothing for longer is ended."""


class MeasureError(Exception):
    """A case cannot be measured."""


# The measuring process: one case, with whichever o2o is on its path.


def timed(run: Callable[[int], object], count: int) -> float:
    """Return the seconds that `run(count)` takes."""
    started = time.perf_counter()
    run(count)
    return time.perf_counter() - started


class Meter:
    """Measures how often per second `run` does a thing; `run` gets how often, and returns when the last is done."""

    def __init__(self, run: Callable[[int], object], overhead: float = 0.0, step: int = 1, unit: float = 1.0) -> None:
        """Call `run` once, which compiles, then until its rate is known.

        `overhead`: seconds of each call that do not count; `step`: counts are multiples of it; `unit`: what once is
        worth.
        """
        self.run, self.overhead, self.step, self.unit = run, overhead, step, unit
        self.first = timed(run, step)
        count, seconds = step, 0.0
        while seconds < 0.1 + overhead:
            count *= 4
            seconds = min(timed(run, count), timed(run, count)) - overhead  # one of the two may compile something, too
        self.rate = count / seconds

    def measure(self, seconds: float) -> float:
        """Run for about so many seconds, at least for eight times the overhead; return units per second."""
        wanted = self.rate * max(seconds, 8.0 * self.overhead)
        count = max(1, round(wanted / self.step)) * self.step
        self.rate = count / (timed(self.run, count) - self.overhead)
        return self.rate * self.unit


def with_settings(config: Any, inner: bool = False, /, **values: Any) -> Any:
    """Return a dataclass with these fields replaced wherever it, or a dataclass inside it, has them.

    The settings of an agent inside another (`inner`) keep their `online`: the outer agent's holds.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in values:
            changes[field.name] = values[field.name]
        elif dataclasses.is_dataclass(value) and not (inner and field.name == "online"):
            changes[field.name] = with_settings(value, True, **values)
    return dataclasses.replace(config, **changes)


def still(observation: Any) -> np.ndarray:
    """Act with zeros: the base policy of residual agents."""
    state = observation["state"] if isinstance(observation, dict) else observation
    return np.zeros(24 if len(state) == SHAPES["pen"][1] else 6, np.float32)


def run_config(session: Any, case: dict[str, Any]) -> Any:
    """Return the settings of a case's run: the agent's paper preset (`small`: for a smoke test) on the case's data."""
    env, form, smoke = SHAPES[case["shape"]][0], case["form"], case["smoke"]
    task = session.TaskConfig(binary=False if case["shape"] == "pen" else None)
    config = session.preset_run(case["agent"], case["dataset"], "small" if smoke else "paper", env=env, task=task)
    if "settings" in case:  # of a comparison, whose numbers are its own
        config = dataclasses.replace(config, config=type(config.config)())
    settings: dict[str, Any] = {"batch_size": 16 if smoke else 256, **case.get("settings", {})}
    if config.config.online.replay == "rollout":
        settings |= {"rollout_steps": 64, "num_envs": 2} if smoke else {}
    else:
        warmup = NEVER if form in ("act", "insert") else case["rows"]
        settings |= {"warmup_steps": warmup, "random_steps": NEVER if form == "insert" else 0, "min_rows": 0}
        settings |= {"initial_updates": 0}
        if form.startswith("utd"):
            updates, _, envs = form[3:].partition("x")
            settings |= {"utd_ratio": int(updates), "num_envs": int(envs or 1), "update_every": int(envs or 1)}
    loop = dataclasses.replace(
        config.loop, eval_every=0, offline_eval_every=NEVER, eval_episodes=1, checkpoint_every=NEVER,
        replay_capacity=case["rows"],
    )  # fmt: skip
    return dataclasses.replace(
        config, config=with_settings(config.config, **settings), loop=loop, seeds=case["seeds"],
        cameras=("free",) if case["shape"] == "pixels" else (), image_size=IMAGE_SIZE,
        base=f"{Path(__file__).resolve()}:still" if case["agent"] == "residual" else None,
    )  # fmt: skip


def session_of(case: dict[str, Any]) -> Any:
    """Return the module of the case's checkout that makes runs and trainers."""
    from o2o.startup import prepare_process

    prepare_process()
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")  # what is measured compiles anew
    try:
        from o2o.runs import session  # pyright: ignore[reportMissingImports]
    except ImportError:
        from o2o import experiment as session  # before the packages  # pyright: ignore[reportAttributeAccessIssue]
    if not Path(session.__file__).is_relative_to(case["checkout"]):
        raise MeasureError(f"o2o was imported from {session.__file__}, not from {case['checkout']}")
    return session


def meter_of(case: dict[str, Any], session: Any) -> Meter:
    """Return what measures a case of ours."""
    import gymnasium

    module, _, name = SHAPES[case["shape"]][0].rpartition(":")
    if module:
        importlib.import_module(module)  # registers it
    config, form = run_config(session, case), case["form"]
    gymnasium.registry[name].max_episode_steps = 10 if form == "offline" else EPISODE_STEPS  # short evaluations
    trainer, done = session.build(config), 0

    def go(count: int) -> None:
        nonlocal done
        done += count
        (trainer.offline if form == "offline" else trainer.online)(done)

    def evaluate(count: int = 1) -> int:
        return sum(row["length"] for _ in range(count) for row in trainer.evaluate())

    if form == "act":
        meter = Meter(evaluate)
        meter.unit = evaluate()
        return meter
    evaluate()
    overhead = statistics.median(timed(evaluate, 1) for _ in range(3))
    online = config.config.online
    if form != "offline" and online.replay != "rollout":
        go(case["rows"] + 1)  # the replay buffer is full and grows no more; the next step is the first with an update
    step = online.rollout_steps if online.replay == "rollout" else online.num_envs
    return Meter(go, overhead, 1 if form == "offline" else step, case["seeds"])


def machine() -> dict[str, Any]:
    """Return the device, its rate of float32 products of 2048 x 2048 in GFLOP/s, and JAX's version."""
    import jax
    import jax.numpy as jnp

    name, info = jax.devices()[0].device_kind, Path("/proc/cpuinfo")
    if jax.default_backend() == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        lines = info.read_text().splitlines() if info.exists() else []
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
        name = f"{model}, {cores} cores"
    matrix = jnp.eye(2048, dtype=jnp.float32)
    product = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: x @ y, x))
    meter = Meter(lambda count: product(matrix, count).block_until_ready(), unit=2 * 2.048**3)
    rate = statistics.median(meter.measure(0.3) for _ in range(3))
    return {"device": name, "matmul_gflops": rate, "jax": jax.__version__}


def serve(make: Callable[[], dict[str, Meter]], about: Callable[[], dict[str, Any]] = machine) -> None:
    """Make a meter per form, say that they are ready, and answer requests `[form, seconds]` until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to standard error
    try:
        meters = make()
        first = next(iter(meters.values())).first
        ready = {"forms": list(meters), "first_call_s": first, **about()}
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}) + "\n")
        raise
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        form, seconds = json.loads(line)
        rate = meters[form].measure(seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1000.0 if sys.platform == "linux" else 1e6)
        answers.write(json.dumps({"rate": rate, "peak_mb": peak}) + "\n")


# The process that asks.


class Worker:
    """A measuring process."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        """Start it; it makes itself ready meanwhile."""
        self.name, self.errors = name, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env
        )

    def answer(self) -> dict[str, Any]:
        """Return its next answer; raises `MeasureError` if it has ended, or says nothing for too long."""
        assert self.process.stdout is not None
        timer = threading.Timer(ANSWER_SECONDS, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        found = json.loads(line) if line else {"error": self._last_words()}
        if "error" in found:
            raise MeasureError(f"{self.name}: {found['error']}")
        return found

    def _last_words(self) -> str:
        self.process.wait(10.0)
        self.errors.seek(0)
        said = [line.strip() for line in self.errors if line.strip()]
        return f"ended with code {self.process.returncode}" + (f"; {said[-1]}" if said else "")

    def measure(self, form: str, seconds: float) -> dict[str, Any]:
        """Return what a form makes now."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([form, seconds]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.errors.close()


def python_path(checkout: Path = CHECKOUT) -> str:
    """Return `PYTHONPATH` of a process that takes o2o from a checkout, and all else from where this one does."""
    others = (path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)
    return os.pathsep.join([str(checkout), *others])


def worker_of(case: dict[str, Any], checkout: Path) -> Worker:
    """Start the process that measures a case with the code of a checkout."""
    message = json.dumps({**case, "checkout": str(checkout)})
    cache = Path(case["dataset"]).parents[1] / f"cache{str(checkout).replace(os.sep, '-')}"  # formats may differ
    env = {**os.environ, "PYTHONPATH": python_path(checkout), "O2O_CACHE": str(cache)}
    return Worker(case["name"], [sys.executable, str(Path(__file__).resolve()), "--child", message], env)


def in_turns(
    workers: Sequence[Worker], forms: Sequence[Sequence[str]], smoke: bool, seconds: float = SECONDS
) -> list[list[float]]:
    """Return each worker's rates of its forms: a list per form, all taking turns, in another order each round."""
    rounds, seconds = (2, SMOKE_SECONDS) if smoke else (REPEATS, seconds)
    pairs = [(worker, form) for worker, own in zip(workers, forms, strict=True) for form in own]
    turns: list[tuple[Worker, str, list[float]]] = [(*pair, []) for pair in pairs]
    for i in range(rounds):
        for worker, form, rates in turns if i % 2 == 0 else reversed(turns):
            time.sleep(PAUSE)  # threads that spin for more work have given up by then
            rates.append(worker.measure(form, seconds)["rate"])
    return [rates for _, _, rates in turns]


@contextmanager
def datasets(smoke: bool, shapes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Write random Minari datasets, one per shape, for as long as they are needed; yield their folders and rows."""
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    warnings.simplefilter("ignore", UserWarning)  # of data without an author
    rng, sizes = np.random.default_rng(0), {"pixels": 2_000}
    with tempfile.TemporaryDirectory() as root:
        os.environ["MINARI_DATASETS_PATH"], found = root, {}
        for shape in dict.fromkeys(shapes):
            _, observation, action = SHAPES[shape]
            rows = 1_000 if smoke else sizes.get(shape, 20_000)
            spaces: dict[str, gymnasium.Space] = {
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (observation,), np.float32),
                "free": gymnasium.spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
            }

            episodes = []
            for _ in range(rows // EPISODE_STEPS):
                state = rng.standard_normal((EPISODE_STEPS + 1, observation)).astype(np.float32)
                images = rng.integers(0, 256, (EPISODE_STEPS + 1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
                arrays: dict[str, Any] = {
                    "observations": {"state": state, "free": images} if shape == "pixels" else state,
                    "actions": np.tanh(rng.standard_normal((EPISODE_STEPS, action))).astype(np.float32),
                }
                ends = [*[False] * (EPISODE_STEPS - 1), True]
                rewards = rng.standard_normal(EPISODE_STEPS).tolist()
                never = [False] * EPISODE_STEPS
                episodes.append(EpisodeBuffer(**arrays, rewards=rewards, terminations=never, truncations=ends))
            minari.create_dataset_from_buffers(
                DATASETS[shape], episodes,
                observation_space=gymnasium.spaces.Dict(spaces) if shape == "pixels" else spaces["state"],
                action_space=gymnasium.spaces.Box(-1.0, 1.0, (action,), np.float32),
            )  # fmt: skip
            found[shape] = {"dataset": f"{root}/{DATASETS[shape]}", "rows": rows}
        yield found


def all_cases() -> list[str]:
    """Return the names of all cases."""
    from o2o.agents import AGENTS

    names = []
    for agent, kind in AGENTS.items():
        config: Any = kind.preset("locomotion", "paper").config
        forms = ("offline", "act", "insert", "utd1", "utd4", "utd20")
        if config.online.replay in ("none", "rollout"):
            forms = ("offline", "act", "online")
        forms += ("utd1x4", "utd1x16") if agent in ("sac", "rlpd") else ()
        shapes = ("pen", "cheetah", "pixels") if hasattr(config, "encoder") else ("pen", "cheetah")
        names += [f"{agent}/{shape}/{seeds}/{form}" for shape in shapes for seeds in SEEDS for form in forms]
        if kind.preset("ogbench", "paper").tasks:
            names += [f"{agent}/scene/{seeds}/offline" for seeds in PAY_SEEDS]
    return names


def chosen(patterns: Sequence[str], without: Sequence[str]) -> list[str]:
    """Return the cases that the patterns select, `without` them those; raises `MeasureError` for one without a case."""
    found = {pattern: fnmatch.filter(all_cases(), pattern) for pattern in patterns}
    for pattern, names in found.items():
        if not names:
            raise MeasureError(f"no case is like {pattern!r}; a case is AGENT/SHAPE/SEEDS/FORM, such as {AGAINST[0]}")
    return list(dict.fromkeys(sum(found.values(), []))) if patterns else list(without)


def case_of(name: str, smoke: bool, data: dict[str, Any]) -> dict[str, Any]:
    """Return what the process that measures a case is told; `data` is what `datasets` made."""
    agent, shape, seeds, form = name.split("/")
    about = {"name": name, "agent": agent, "shape": shape, "seeds": int(seeds), "form": form, "smoke": smoke}
    return {**about, **data[shape]}


def spread(values: Sequence[float], form: str = ",.3g") -> str:
    """Return the median, with least and most in brackets."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def measure_rates(names: Sequence[str], smoke: bool, again: bool, folder: Path, together: int = 1) -> int:
    """Measure the cases that have no row yet, or all `again`; write every row at once. Return the exit code."""
    have = set() if again or smoke else {row["case"] for row in read_table(folder / "rates.csv")}
    names, failed = [name for name in names if name not in have], 0
    shared = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
    with datasets(smoke, [name.split("/")[1] for name in names]) as data:
        for first in range(0, len(names), together):
            workers = {}
            try:
                for name in names[first : first + together]:
                    workers[name] = worker_of(case_of(name, smoke, data), CHECKOUT)
                ready: dict[str, dict[str, Any]] = {}
                for name, worker in workers.items():
                    try:
                        ready[name] = worker.answer()
                    except MeasureError as error:
                        print(error, flush=True)
                        failed = 1
                for name in ready:
                    failed |= _measure_rate(name, workers[name], {**shared, **ready[name]}, smoke, folder)
            finally:
                for worker in workers.values():
                    worker.close()
    print(f"written to {folder}")
    return failed


def _measure_rate(name: str, worker: Worker, about: dict[str, Any], smoke: bool, folder: Path) -> int:
    """Measure one case and write its row; return the exit code."""
    form = name.split("/")[-1]
    try:
        found = [worker.measure(form, SMOKE_SECONDS if smoke else SECONDS) for _ in range(REPEATS)]
    except MeasureError as error:
        print(error, flush=True)
        return 1
    rates, unit = [each["rate"] for each in found], "updates" if form == "offline" else "steps"
    row = {**about, "case": name, "unit": unit, "per_second": statistics.median(rates)}
    row |= {"least": min(rates), "most": max(rates), "peak_mb": found[-1]["peak_mb"]}
    texts = {key: f"{v:.4g}" if isinstance(v := row[key], float) else str(v) for key in COLUMNS}
    old = [r for r in read_table(folder / "rates.csv") if (r["device"], r["case"]) != (row["device"], name)]
    rows = sorted([*old, texts], key=lambda r: (r["device"], r["case"]))
    text = "# Rates\n\nMade by `python benchmarks/throughput.py`, whose docstring explains the cases.\n\n"
    write_table(folder, "rates.csv", rows, text + markdown_table(COLUMNS, rows))
    print(f"{name:<28} {spread(rates)} {unit}/s", flush=True)
    return 0


def commit() -> str:
    """Return the commit of this checkout; empty where nobody knows it."""
    from o2o.runs.folder import versions

    return versions().get("commit", "")


def measure_seeds(agents: Sequence[str], smoke: bool, folder: Path) -> int:
    """Measure what `PAY_SEEDS` seeds in one program make at OGBench's sizes, in turns. Return the exit code."""
    failed = 0
    with datasets(smoke, ["scene"]) as data:
        for agent in agents:
            names, workers, ready = [f"{agent}/scene/{seeds}/offline" for seeds in PAY_SEEDS], [], []
            try:
                for name in names:
                    workers.append(worker_of(case_of(name, smoke, data), CHECKOUT))
                    ready.append(workers[-1].answer())  # one at a time: they compile
                found = in_turns(workers, [["offline"]] * len(workers), smoke, PAY_SECONDS)
            except MeasureError as error:
                print(f"{agent}: {error}", flush=True)
                failed = 1
                continue
            finally:
                for worker in workers:
                    worker.close()
            shared = {"device": ready[0]["device"], "agent": agent, "jax": ready[0]["jax"], "commit": commit()}
            rows = [
                {
                    **shared, "seeds": str(seeds),
                    "updates_per_second": f"{statistics.median(rates):.4g}",
                    "rates": " ".join(f"{rate:.4g}" for rate in rates), "date": time.strftime("%Y-%m-%d"),
                }
                for seeds, rates in zip(PAY_SEEDS, found, strict=True)
            ]  # fmt: skip
            key = (shared["device"], agent)
            old = [row for row in read_table(folder / "rounds.csv") if (row["device"], row["agent"]) != key]
            rows = sorted([*old, *rows], key=lambda row: (row["device"], row["agent"], int(row["seeds"])))
            rows = [{column: row[column] for column in PAY_COLUMNS} for row in rows]
            write_table(folder, "rounds.csv", rows, seeds_text(rows))
            print(f"{agent:<10} {', '.join(spread(rates) for rates in found)} updates/s", flush=True)
    print(f"written to {folder}")
    return failed


def seeds_text(rows: Sequence[dict[str, str]]) -> str:
    """Return the report on seeds side by side: what an update of n seeds costs in updates of one, round by round."""
    text = (
        "# Seeds side by side at OGBench's sizes\n\nMade by `python benchmarks/throughput.py --seeds-pay`: "
        "pre-training of 1, 2 and 4 seeds in one program, the `paper` preset of each agent for OGBench's scene "
        "(batches of 256, chunks of 5), in turns. Cost: of an update of all seeds, in updates of one seed in the same "
        "round; n would be a run after the other. Medians over the rounds, least and most in brackets.\n"
    )
    for device in dict.fromkeys(row["device"] for row in rows):
        cells = []
        for agent in dict.fromkeys(row["agent"] for row in rows if row["device"] == device):
            own = {int(row["seeds"]): row for row in rows if (row["device"], row["agent"]) == (device, agent)}
            rates = {seeds: [float(rate) for rate in row["rates"].split()] for seeds, row in own.items()}
            costs = {n: [n * one / all_ for one, all_ in zip(rates[1], rates[n], strict=True)] for n in rates}
            cells.append(
                {"agent": agent, "updates/s, one seed": spread(rates[1])}
                | {f"cost of {n}": spread(costs[n], ".2f") for n in sorted(rates) if n > 1}
            )
        about = next(row for row in rows if row["device"] == device)
        text += f"\n## {device}\n\njax {about['jax']}, {about['date']}.\n\n{markdown_table(list(cells[0]), cells)}"
    return text


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none without the file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def write_table(folder: Path, name: str, rows: Sequence[dict[str, str]], text: str) -> None:
    """Write rows into the CSV file `name` of a folder, and `text` into its `README.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.part").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{name}.part").replace(folder / name)
    (folder / "README.md").write_text(text)


def markdown_table(columns: Sequence[str], rows: Sequence[dict[str, str]]) -> str:
    """Return rows as a table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row[name] for name in columns)} |" for row in rows), ""])


def compare(names: Sequence[str], other: Path, smoke: bool) -> int:
    """Print, case by case, the ratio of this checkout's rates to those of another one's. Return the exit code."""
    failed = 0
    print("| case | here, per second | there, per second | ratio |\n| --- | --: | --: | --: |", flush=True)
    with datasets(smoke, [name.split("/")[1] for name in names]) as data:
        for name in names:
            case, workers = case_of(name, smoke, data), []
            try:
                for checkout in (CHECKOUT, other):
                    workers.append(worker_of(case, checkout))
                    workers[-1].answer()  # one at a time: they compile
                forms = [[case["form"]]] * 2
                here, there = in_turns(workers, forms, smoke)
            except MeasureError as error:
                print(error, flush=True)
                failed = 1
                continue
            finally:
                for worker in workers:
                    worker.close()
            ratios = [a / b for a, b in zip(here, there, strict=True)]
            print(f"| {name} | {spread(here)} | {spread(there)} | {spread(ratios, '.2f')} |", flush=True)
    return failed


def main(args: list[str]) -> int:
    """Measure what the arguments select; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--again", action="store_true", help="measure cases that have a row, too")
    parser.add_argument("--smoke", action="store_true", help="a few tiny cases")
    parser.add_argument(
        "--on-gpu", action="store_true", help="the cases most wanted of a GPU, where no PATTERN is given"
    )
    parser.add_argument("--seeds-pay", action="store_true", help="seeds side by side; then PATTERNs are agents")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="processes that start side by side")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout to measure in turns with")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(args)
    if given.child:
        serve(lambda: {given.child["form"]: meter_of(given.child, session_of(given.child))})
        return 0
    sys.path.insert(0, str(CHECKOUT))
    if given.against and not (given.against / "o2o" / "__init__.py").exists():
        parser.error(f"--against {given.against}: no checkout of o2o there")
    if given.together < 1:
        parser.error(f"--together {given.together}: at least one process")
    default = ON_GPU if given.on_gpu else AGAINST if given.against else all_cases()
    if given.seeds_pay:
        patterns, default = [f"{agent}/scene/1/offline" for agent in given.patterns], ("ifql/scene/1/offline",)
    else:
        patterns, default = given.patterns, SMOKE if given.smoke and not given.on_gpu else default
    try:
        names = chosen(patterns, default)
    except MeasureError as error:
        parser.error(str(error))
    if given.seeds_pay:
        own = SMOKE_RATES if given.smoke else HERE / "results" / "seeds_pay"
        return measure_seeds([name.split("/")[0] for name in names], given.smoke, given.out or own)
    if given.against:
        return compare(names, given.against.resolve(), given.smoke)
    folder = given.out or (SMOKE_RATES if given.smoke else RATES)
    return measure_rates(names, given.smoke, given.again, folder, given.together)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted: what was finished is kept")
