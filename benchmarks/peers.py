"""Our training steps beside those of SBX and d3rlpy, measured in turns in the same run.

    python benchmarks/peers.py [--smoke] [--here] [--out FOLDER] [CASE ...]

The other libraries come from the package registry into a virtual environment of their own, `runs/peers` or the folder
named by `O2O_PEERS` (about 2 GB). Everything runs on the CPU, each library with the thread settings of its own. Results
go to `benchmarks/results/peers/`; a case that is measured anew replaces its rows. Run it alone on the machine. `--here`
installs nothing: it takes the libraries that this Python has, if any, on the device that each finds by itself.

Beside our rate stands what bounds it: the matrix products of our update and nothing else, each in its very shape
(`products alone`), and as many FLOPs in products of 2048 x 2048 (`large products`).
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import throughput
from throughput import CHECKOUT, HERE, MeasureError, Meter, markdown_table, python_path, read_table, spread

FOLDER = Path(os.environ.get("O2O_PEERS") or CHECKOUT / "runs" / "peers")
PACKAGES = ("sbx-rl", "d3rlpy", "gymnasium[mujoco]", "mujoco<3.12")
HIDDEN = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "XLA_FLAGS", "PYTHONPATH")
"""Variables that other libraries do not inherit: they run with their own defaults."""
AS_RUN, ALONE, PRODUCTS, LARGE = "as run", "update alone", "products alone", "large products"


@dataclass(frozen=True)
class Case:
    """One setting that several libraries run: 256 x 256 networks, full updates on minibatches of 256."""

    title: str
    algorithm: str
    agent: str
    """Ours."""
    libraries: tuple[str, ...]
    critics: int = 2
    layer_norm: bool = False
    utd: int = 1
    env: str | None = None
    """Environment of a whole online loop; None for updates on random rows of Adroit's pen."""
    wanted: dict[str, float] = field(default_factory=dict)
    """Library to what the fastest published code, or a published experiment, reached against it elsewhere."""

    def about(self, smoke: bool) -> dict[str, Any]:
        """Return what a measuring process is told, of ours and of theirs."""
        form = f"utd{self.utd}" if self.env or self.utd > 1 else "offline"
        hidden = [32, 32] if smoke else [256, 256]
        return {
            "algorithm": self.algorithm, "agent": self.agent, "critics": self.critics, "layer_norm": self.layer_norm,
            "utd": self.utd, "env": self.env, "shape": "cheetah" if self.env else "pen", "seeds": 1, "form": form,
            "smoke": smoke, "hidden": hidden, "batch": 16 if smoke else 256, "checkout": str(CHECKOUT),
        }  # fmt: skip


CASES = {
    "sac-utd1": Case(
        "SAC as RLPD has it: 10 critics with layer norm, one update per step", "sac", "rlpd", ("sbx", "d3rlpy"),
        10, True, wanted={"sbx": 1.62},
    ),
    "sac-utd20": Case(
        "The same, 20 critic updates and one of actor and temperature per step", "sac", "rlpd", ("sbx",), 10, True, 20,
        wanted={"sbx": 1.5},
    ),
    "iql": Case("IQL, 2 critics", "iql", "iql", ("d3rlpy",), wanted={"d3rlpy": 3.18}),
    "cql": Case("CQL, 2 critics, 10 actions of each kind", "cql", "cql", ("d3rlpy",), wanted={"d3rlpy": 1.89}),
    "loop": Case(
        "The whole online loop: SAC, 2 critics, one update per step of HalfCheetah-v5", "sac", "sac", ("sbx",),
        env="HalfCheetah-v5", wanted={"sbx": 2.0},
    ),
}  # fmt: skip


# Our side.


def ours(case: dict[str, Any]) -> dict[str, Meter]:
    """Return our meters: critic updates (environment steps of `loop`) per second, and what bounds them."""
    hidden = tuple(case["hidden"])
    case["settings"] = {
        "actor_hidden_dims": hidden, "critic_hidden_dims": hidden, "value_hidden_dims": hidden,
        "num_critics": case["critics"], "critic_layer_norm": case["layer_norm"],
    }  # fmt: skip
    if case["algorithm"] == "cql":
        case["settings"] |= {"shared_output": False, "target_subset": None, "max_target_actions": None, "subset": None}
        case["settings"] |= {"actor_layer_norm": False}
    session = throughput.session_of(case)
    whole = throughput.meter_of(case, session)
    whole.unit *= case["utd"]
    return {AS_RUN: whole, **bounds(case, session)}


def bounds(case: dict[str, Any], session: Any) -> dict[str, Meter]:
    """Return meters of an update's products alone, and of as many FLOPs in large products; in updates per second."""
    import jax
    import jax.numpy as jnp

    from o2o.agents import AGENTS

    config, (rows, utd) = throughput.run_config(session, case).config, (case["batch"], case["utd"])
    size, actions = sizes(case)
    shapes = {"observations": (size,), "actions": (actions,), "rewards": (), "masks": (), "next_observations": (size,)}
    batch = {key: jnp.zeros((utd, rows, *shape)) for key, shape in shapes.items()}
    agent = AGENTS[case["agent"]].create(jax.random.key(0), batch["observations"][0], batch["actions"][0], config)
    kinds = kinds_of(jax.jit(lambda a, b: a.update(b)).trace(agent, batch).jaxpr.jaxpr)
    each = [(alone(*kind), times) for kind, (times, _) in kinds.items()]

    def run(count: int) -> None:
        for product, times in each:
            product(count * times)

    large = 128 if case["smoke"] else 2048
    share = 2.0 * large**3 / sum(times * flops for times, flops in kinds.values())
    plain = (((1,), (0,)), ((), ()))
    return {PRODUCTS: Meter(run, unit=utd), LARGE: Meter(alone(((large, large),) * 2, plain), unit=share * utd)}


def alone(shapes: Any, numbers: Any) -> Callable[[int], object]:
    """Return what makes a product of two arrays of these shapes, each about like the one before, in one program."""
    import jax
    import jax.numpy as jnp

    first, second = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    @jax.jit
    def run(first: Any, second: Any, count: Any) -> Any:
        def again(_: Any, carry: Any) -> Any:
            changed, total = carry
            out = jax.lax.dot_general(changed, second, numbers)
            corner = (0,) * changed.ndim  # changed a little: else the product could be made once for all rounds
            return changed.at[corner].add(1e-6 * out[(0,) * out.ndim]), total + out[(-1,) * out.ndim]

        return jax.lax.fori_loop(0, count, again, (first, jnp.zeros(())))[1]

    return lambda count: run(first, second, jnp.asarray(count, jnp.int32)).block_until_ready()


def kinds_of(jaxpr: Any) -> dict[Any, tuple[int, float]]:
    """Return every kind of product in a jaxpr, as `alone` takes it: how often it is made, and the FLOPs of one.

    All rounds of scans are counted, one round of whiles, and of branches the one with the most FLOPs. JAX's gradient of
    a product by its weights is a product that is transposed afterwards; XLA makes it with its operands exchanged, which
    is faster where it is thin, so it is named that way.
    """
    kinds: dict[Any, tuple[int, float]] = {}
    for kind, times, flops in _products(jaxpr, 1):
        kinds[kind] = (kinds.get(kind, (0, 0.0))[0] + times, flops)
    return kinds


def _products(jaxpr: Any, rounds: int) -> list[tuple[Any, int, float]]:
    found, exchanged = [], _exchanged_results(jaxpr)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes = tuple(variable.aval.shape for variable in equation.invars)
            (left, right), batch = equation.params["dimension_numbers"]
            flops = 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in left)
            kind = (shapes, ((left, right), batch))
            if equation.outvars[0] in exchanged:
                kind = (shapes[::-1], ((right, left), batch[::-1]))
            found.append((kind, rounds, flops))
        times = rounds * equation.params["length"] if equation.primitive.name == "scan" else rounds
        inner = [_products(sub, times) for sub in _jaxprs(equation.params)]
        if equation.primitive.name == "cond":
            inner = [max(inner, key=lambda branch: sum(n * flops for _, n, flops in branch))]
        found += sum(inner, [])
    return found


def _exchanged_results(jaxpr: Any) -> set[Any]:
    """Return the variables of a jaxpr that nothing reads but an exchange of their last two axes."""
    readers: dict[Any, int] = {}
    exchanged = []
    for equation in jaxpr.eqns:
        for variable in equation.invars:
            if not hasattr(variable, "val"):  # no literal
                readers[variable] = readers.get(variable, 0) + 1
        if equation.primitive.name == "transpose":
            order = tuple(range(len(equation.params["permutation"])))
            if equation.params["permutation"] == (*order[:-2], *order[:-3:-1]):
                exchanged.append(equation.invars[0])
    return {v for v in exchanged if readers[v] == 1 and v not in jaxpr.outvars}


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """Return the jaxprs among an equation's parameters, closed ones opened."""
    values = [v for p in params.values() for v in (p if isinstance(p, Sequence) and not isinstance(p, str) else [p])]
    opened = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in opened if hasattr(value, "eqns")]


# The other libraries, each imported only in the process that measures it.


def sizes(case: dict[str, Any]) -> tuple[int, int]:
    """Return the sizes of observation and action."""
    return (17, 6) if case["env"] else (45, 24)


def random_rows(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return random transitions, leaves `[rows, ...]`: an episode's end in each thousand, none terminal."""
    rng, rows, (size, actions) = np.random.default_rng(0), case["rows"], sizes(case)
    ends = np.zeros(rows, np.float32)
    ends[999::1000] = ends[-1] = 1.0
    normal = lambda *shape: rng.standard_normal((rows, *shape)).astype(np.float32)  # noqa: E731
    return {
        "observations": normal(size), "actions": np.tanh(normal(actions)), "rewards": normal(),
        "next_observations": normal(size), "ends": ends,
    }  # fmt: skip


def repeat(step: Callable[[], object]) -> Callable[[int], object]:
    """Return what does a step so many times."""
    return lambda count: [step() for _ in range(count)] and None


def sbx(case: dict[str, Any]) -> dict[str, Meter]:
    """Return the meters of SBX's SAC: `train` (draws in NumPy, then updates), or of a whole loop `learn`."""
    gym = importlib.import_module("gymnasium")

    class Still(gym.Env):
        """Never stepped; has the case's shapes."""

        observation_space = gym.spaces.Box(-np.inf, np.inf, (sizes(case)[0],), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (sizes(case)[1],), np.float32)

    policy = {"n_critics": case["critics"], "net_arch": list(case["hidden"])}
    model = importlib.import_module("sbx").SAC(
        "MlpPolicy", gym.make(case["env"]) if case["env"] else Still(), batch_size=case["batch"], seed=0,
        buffer_size=case["rows"], gradient_steps=case["utd"], policy_delay=case["utd"],
        policy_kwargs={**policy, **({"layer_norm": True} if case["layer_norm"] else {})},
    )  # fmt: skip
    if case["env"]:
        model.learn(200)  # past its 100 random steps
        return {AS_RUN: Meter(lambda count: model.learn(count, reset_num_timesteps=False))}
    model.set_logger(importlib.import_module("stable_baselines3.common.logger").configure(None, []))
    rows, buffer = random_rows(case), model.replay_buffer
    for i in range(case["rows"]):
        seen = [rows[key][i : i + 1] for key in ("observations", "next_observations", "actions", "rewards")]
        buffer.add(*seen, np.zeros(1, np.float32), [{}])
    run = repeat(lambda: model.train(gradient_steps=case["utd"], batch_size=case["batch"]))
    draw, drawn = buffer.sample, buffer.sample(case["batch"] * case["utd"])

    def update_alone(count: int) -> None:
        buffer.sample = lambda *_, **__: drawn
        run(count)
        buffer.sample = draw

    return {AS_RUN: Meter(run, unit=case["utd"]), ALONE: Meter(update_alone, unit=case["utd"])}


def d3rlpy(case: dict[str, Any]) -> dict[str, Meter]:
    """Return the meters of an algorithm of d3rlpy: what its `fit` does in each step."""
    library = importlib.import_module("d3rlpy")
    encoder, rows = library.models.VectorEncoderFactory, random_rows(case)
    plain, normed = encoder(list(case["hidden"])), encoder(list(case["hidden"]), use_layer_norm=case["layer_norm"])
    settings: dict[str, Any] = {"batch_size": case["batch"], "n_critics": case["critics"]}
    settings |= {"actor_encoder_factory": plain, "critic_encoder_factory": normed}
    if case["algorithm"] == "iql":
        settings["value_encoder_factory"] = plain
    if case["algorithm"] == "cql":
        settings |= {"n_action_samples": 10, "alpha_learning_rate": 0.0, "initial_alpha": 1.0}
    kind = {"iql": library.algos.IQLConfig, "cql": library.algos.CQLConfig, "sac": library.algos.SACConfig}
    data = library.dataset.MDPDataset(
        rows["observations"], rows["actions"], rows["rewards"][:, None], np.zeros(case["rows"]), rows["ends"]
    )
    gpu = os.environ.get("JAX_PLATFORMS") != "cpu" and importlib.import_module("torch").cuda.is_available()
    algorithm = kind[case["algorithm"]](**settings).create(device="cuda:0" if gpu else "cpu:0")
    algorithm.build_with_dataset(data)
    drawn = data.sample_transition_batch(case["batch"])
    run = repeat(lambda: algorithm.update(data.sample_transition_batch(case["batch"])))
    return {AS_RUN: Meter(run), ALONE: Meter(repeat(lambda: algorithm.update(drawn)))}


LIBRARIES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Meter]], tuple[str, ...], str]] = {
    "o2o": (ours, ("jax",), ""),
    "sbx": (sbx, ("sbx-rl", "jax"), "takes the minimum over all critics"),
    "d3rlpy": (
        d3rlpy, ("d3rlpy", "torch"),
        "SAC: minimum over all critics, layer norm behind the activation; CQL: targets take the policy's mode",
    ),
}  # fmt: skip
"""Name to what makes the meters, packages whose releases are recorded, and where its mathematics differ."""


# The process that asks.


def peers_python() -> Path:
    """Return the Python of the other libraries' environment, made if it is not there yet.

    Raises `MeasureError` if that fails. A folder that was not made here is never emptied.
    """
    python, stamp = FOLDER / "bin" / "python", FOLDER / "installed.json"
    if stamp.exists() and json.loads(stamp.read_text()) == list(PACKAGES) and python.exists():
        return python
    if FOLDER.exists() and not stamp.exists() and (not FOLDER.is_dir() or any(FOLDER.iterdir())):
        raise MeasureError(f"{FOLDER} holds something else, and would be emptied: name a new folder in O2O_PEERS")
    print(f"installing {', '.join(PACKAGES)} into {FOLDER} (some minutes, about 2 GB) ...", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", "--clear", str(FOLDER)], [*pip, *PACKAGES]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise MeasureError(f"{' '.join(command)} failed: {''.join(last)}")
        stamp.write_text("[]")  # made here, not filled yet
    stamp.write_text(json.dumps(list(PACKAGES)))
    return python


def contest(name: str, smoke: bool, python: Path | None, data: dict[str, Any]) -> list[dict[str, str]]:
    """Run a case's rounds, in which ours and the other libraries take turns; return a row per library and form.

    `python` None: this Python and the libraries that it has, on the device that each finds.
    """
    about, workers, ready = {**CASES[name].about(smoke), **data}, [], []
    there = [library for library in CASES[name].libraries if python or importlib.util.find_spec(library)]
    libraries = ("o2o", *there)
    try:
        for library in libraries:
            own = library == "o2o" or python is None
            command = [sys.executable if own else str(python), str(HERE / "peers.py"), "--child"]
            env = {key: value for key, value in os.environ.items() if own or key not in HIDDEN}
            env |= {} if python is None else {"JAX_PLATFORMS": "cpu"}
            env |= {"PYTHONPATH": python_path()} if library == "o2o" else {}
            worker = throughput.Worker(library, [*command, json.dumps({**about, "library": library})], env)
            try:
                ready.append({"library": library, **worker.answer()})  # one at a time: memory, and compilers
            except MeasureError as error:
                worker.close()
                if python or library == "o2o":
                    raise
                print(f"{name}: {error}", flush=True)  # what is here need not be whole
                continue
            workers.append(worker)
        forms = [found["forms"] for found in ready]
        rounds = iter(throughput.in_turns(workers, forms, smoke))
    finally:
        for worker in workers:
            worker.close()
    return [
        {
            "device": ready[0]["device"], "case": name, "library": found["library"], "version": found["version"],
            "form": form,
            "rates": " ".join(f"{rate:.5g}" for rate in next(rounds)), "date": time.strftime("%Y-%m-%d"),
        }
        for found in ready
        for form in found["forms"]
    ]  # fmt: skip


def report(rows: Sequence[dict[str, str]]) -> str:
    """Return the tables in Markdown: rates, and o2o's ratio to each, round by round."""
    text = (
        "# Comparison with other libraries\n\nMade by `python benchmarks/peers.py`, whose docstring explains it. "
        "Medians over the rounds, least and most in brackets. 'wanted': what the fastest published code, or a "
        "published experiment, reached against that library elsewhere.\n"
    )
    for device, name in dict.fromkeys((row["device"], row["case"]) for row in rows):
        own = [row for row in rows if (row["device"], row["case"]) == (device, name)]
        rates = {(row["library"], row["form"]): [float(rate) for rate in row["rates"].split()] for row in own}
        cells = []
        for row in own:
            each, wanted = rates[row["library"], row["form"]], CASES[name].wanted.get(row["library"], "")
            ratios = [a / b for a, b in zip(rates["o2o", AS_RUN], each, strict=True)]
            more = {"per second": spread(each), "o2o / it": spread(ratios, ".2f"), "wanted": str(wanted)}
            cells.append({**row, **more, "differs": LIBRARIES[row["library"]][2]})
        columns = ("version", "form", "per second", "o2o / it", "wanted", "differs")
        text += f"\n## {CASES[name].title}\n\n{device}, {own[0]['date']}.\n\n{markdown_table(columns, cells)}"
    return text


def main(args: list[str]) -> int:
    """Measure the cases that are named, all if none is; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, into runs/peers-smoke")
    parser.add_argument("--here", action="store_true", help="only libraries that this Python has, on any device")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(args)
    if given.child:
        make, packages, _ = LIBRARIES[given.child["library"]]
        version = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
        own = given.child["library"] == "o2o"
        about = lambda: {"version": f"o2o, {version}", **throughput.machine()} if own else {"version": version}  # noqa: E731
        throughput.serve(lambda: make(given.child), about)
        return 0
    if unknown := [name for name in given.cases if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    own, failed = (CHECKOUT / "runs" / "peers-smoke" if given.smoke else HERE / "results" / "peers"), 0
    folder = given.out or own
    try:
        python = None if given.here else peers_python()
    except MeasureError as error:
        parser.error(str(error))
    with throughput.datasets(given.smoke, ("pen", "cheetah")) as data:
        for name in given.cases or CASES:
            try:
                found = contest(name, given.smoke, python, data["cheetah" if CASES[name].env else "pen"])
            except MeasureError as error:
                print(f"{name}: {error}", flush=True)
                failed = 1
                continue
            key = (found[0]["device"], name)
            old = read_table(folder / "rounds.csv")
            rows = [*(row for row in old if (row["device"], row["case"]) != key), *found]
            throughput.write_table(folder, "rounds.csv", rows, report(rows))
            print(report(found), flush=True)
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted: what was finished is kept")
