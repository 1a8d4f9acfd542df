"""Other libraries' training steps, measured as their users run them, by the Python of an environment of their own.

`python peers.py PEER CASE` (CASE: JSON of `throughput_peers.Case`) prints one JSON line when everything is compiled,
then answers each line `[form, seconds]` on standard input with how often per second that form ran. Nothing here imports
o2o, and each library only where it is measured; `serve` is also how our own side answers.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Run = Callable[[int], object]
"""Do a thing so many times, and wait for the last."""
CASE = dict[str, Any]
ALONE = "the same, always on one minibatch drawn before"
ONE_THREAD = "as run, in one thread of PyTorch instead of one per core"


class MissingError(Exception):
    """The library has no such algorithm."""


@dataclass
class Contender:
    """One library ready to run one case."""

    version: str
    forms: dict[str, tuple[Run, str]]
    """Form to what runs it, and what that includes."""
    units: int = 1
    """What one run counts for: critic updates, or environment steps."""
    about: str = ""
    """Where its mathematics differ from the case."""
    worth: dict[str, float] = field(default_factory=dict)
    """Form to how many runs of the others one of its own counts for, where not 1."""
    rates: dict[str, float] = field(default_factory=dict)
    """Runs per second when last measured."""

    def measure(self, form: str, seconds: float) -> float:
        """Run a form for about so many seconds; return units per second."""
        run = self.forms[form][0]
        if form not in self.rates:
            run(2)  # the first compiles
            self.rates[form] = 1.0 / timed(run, 1)
        count = max(1, round(self.rates[form] * seconds))
        self.rates[form] = count / timed(run, count)
        return self.rates[form] * self.units * self.worth.get(form, 1.0)


def timed(run: Run, count: int) -> float:
    """Return the seconds that `run(count)` takes."""
    started = time.perf_counter()
    run(count)
    return time.perf_counter() - started


def serve(make: Callable[[CASE], Contender], case: CASE) -> None:
    """Make the contender, say that it is ready, answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print goes to standard error
    try:
        contender = make(case)
    except MissingError as missing:
        answers.write(json.dumps({"missing": str(missing)}) + "\n")
        return
    for form in contender.forms:
        contender.measure(form, 0.0)
    notes = {form: note for form, (_, note) in contender.forms.items()}
    answers.write(json.dumps({"version": contender.version, "forms": notes, "about": contender.about}) + "\n")
    for line in sys.stdin:
        form, seconds = json.loads(line)
        answers.write(json.dumps({"rate": contender.measure(form, seconds)}) + "\n")


def repeat(step: Callable[[], object]) -> Run:
    """Return what does a step so many times."""

    def run(count: int) -> None:
        for _ in range(count):
            step()

    return run


def releases(*packages: str) -> str:
    """Return packages with their versions."""
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def one_thread(run: Run) -> Run:
    """Return the same in one thread of PyTorch, which takes a thread per core by itself."""
    torch = importlib.import_module("torch")

    def single(count: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        run(count)
        torch.set_num_threads(before)

    return single


def rows_of(case: CASE) -> dict[str, np.ndarray]:
    """Return synthetic transitions, leaves `[rows, ...]`: one episode end in each thousand, none terminal."""
    rng = np.random.default_rng(0)
    size, ends = case["rows"], np.zeros(case["rows"], np.float32)
    ends[999::1000] = ends[-1] = 1.0
    normal = lambda *shape: rng.standard_normal((size, *shape)).astype(np.float32)  # noqa: E731
    return {
        "observations": normal(case["observation"]),
        "actions": np.tanh(normal(case["action"])),
        "rewards": normal(),
        "next_observations": normal(case["observation"]),
        "ends": ends,
    }


def make_env(case: CASE) -> Any:
    """Return the case's environment, or one of its shapes that is never stepped."""
    gym = importlib.import_module("gymnasium")
    if case["env"]:
        return gym.make(case["env"])

    class Still(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (case["observation"],), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (case["action"],), np.float32)

        def reset(self, **_: Any) -> Any:
            return np.zeros(case["observation"], np.float32), {}

        def step(self, action: Any) -> Any:
            return np.zeros(case["observation"], np.float32), 0.0, False, False, {}

    return Still()


def fill(buffer: Any, case: CASE) -> None:
    """Fill a replay buffer of Stable-Baselines3 with synthetic rows."""
    rows = rows_of(case)
    for i in range(case["rows"]):
        one = slice(i, i + 1)
        buffer.add(
            rows["observations"][one], rows["next_observations"][one], rows["actions"][one], rows["rewards"][one],
            np.zeros(1, np.float32), [{}],
        )  # fmt: skip


def baselines_sac(library: str, case: CASE) -> Contender:
    """Return SAC of `sbx` or `stable_baselines3`; the two share their interface."""
    if case["algorithm"] != "sac":
        raise MissingError(f"has no {case['algorithm'].upper()}")
    jax = library == "sbx"
    if case["utd"] > 1 and not jax:
        raise MissingError("steps the actor with every critic update, so this is its row at UTD 1")
    kind, settings = importlib.import_module(library).SAC, {"n_critics": case["critics"]}
    if case["layer_norm"] and jax:
        settings["layer_norm"] = True
    arguments: dict[str, Any] = {"policy_delay": case["utd"]} if jax else {"device": "cpu"}
    model = kind(
        "MlpPolicy", make_env(case), batch_size=case["batch"], buffer_size=case["capacity"], seed=0,
        gradient_steps=case["utd"], policy_kwargs={**settings, "net_arch": list(case["hidden"])}, **arguments,
    )  # fmt: skip
    packages = ("sbx-rl", "jax") if library == "sbx" else ("stable-baselines3", "torch")
    version = releases(*packages)
    if case["env"]:
        model.learn(200)  # past its 100 random steps
        learn = lambda count: model.learn(max(count, 1), reset_num_timesteps=False)  # noqa: E731
        forms = {"as run": (learn, "`learn`: environment, replay, update, its own logging")}
        forms |= {} if jax else {"one thread": (one_thread(learn), ONE_THREAD)}
        return Contender(version, forms)
    model.set_logger(importlib.import_module("stable_baselines3.common.logger").configure(None, []))
    fill(model.replay_buffer, case)
    train = lambda: model.train(gradient_steps=case["utd"], batch_size=case["batch"])  # noqa: E731
    forms: dict[str, tuple[Run, str]] = {"as run": (repeat(train), "`train`: drawing in NumPy, then the update")}
    draw, drawn = model.replay_buffer.sample, model.replay_buffer.sample(case["batch"] * case["utd"])

    def alone(count: int) -> None:
        model.replay_buffer.sample = lambda *_, **__: drawn
        repeat(train)(count)
        model.replay_buffer.sample = draw

    forms["update alone"] = (alone, ALONE)
    if not jax:
        forms["one thread"] = (one_thread(repeat(train)), ONE_THREAD)
    about = "targets and actor take the minimum over all critics"
    about += "" if jax or not case["layer_norm"] else "; no layer norm"
    return Contender(version, forms, case["utd"], about)


def d3rlpy_config(library: Any, case: CASE) -> tuple[Any, str]:
    """Return d3rlpy's config of a case, and where its mathematics differ."""
    encoder = library.models.VectorEncoderFactory
    plain, normed = encoder(list(case["hidden"])), encoder(list(case["hidden"]), use_layer_norm=case["layer_norm"])
    shared: dict[str, Any] = {
        "batch_size": case["batch"],
        "n_critics": case["critics"],
        "actor_encoder_factory": plain,
        "critic_encoder_factory": normed,
    }
    algos = library.algos
    if case["algorithm"] == "iql":
        return algos.IQLConfig(**shared, value_encoder_factory=plain), ""
    if case["algorithm"] == "cql":
        fixed = {"n_action_samples": 10, "alpha_learning_rate": 0.0, "initial_alpha": 1.0}
        return algos.CQLConfig(**shared, **fixed), "targets take the mode of the policy"
    about = "targets and actor take the minimum over all critics"
    return algos.SACConfig(**shared), about + ("; layer norm after the activation" if case["layer_norm"] else "")


def d3rlpy(case: CASE) -> Contender:
    """Return an algorithm of d3rlpy."""
    if case["env"]:
        raise MissingError("its `fit_online` cannot be timed without the episode under way being dropped")
    if case["utd"] > 1:
        raise MissingError("steps the actor with every critic update, so this is its row at UTD 1")
    library = importlib.import_module("d3rlpy")
    rows, (config, about) = rows_of(case), d3rlpy_config(library, case)
    data = library.dataset.MDPDataset(
        rows["observations"], rows["actions"], rows["rewards"][:, None], np.zeros(case["rows"]), rows["ends"]
    )
    algorithm = config.create(device="cpu:0")
    algorithm.build_with_dataset(data)
    drawn = data.sample_transition_batch(case["batch"])
    forms = {
        "as run": (
            repeat(lambda: algorithm.update(data.sample_transition_batch(case["batch"]))),
            "what `fit` does in each step: drawing a minibatch row by row in Python, then the update",
        ),
        "update alone": (repeat(lambda: algorithm.update(drawn)), ALONE),
    }
    forms["one thread"] = (one_thread(forms["as run"][0]), ONE_THREAD)
    return Contender(releases("d3rlpy", "torch"), forms, 1, about)


PEERS: dict[str, Callable[[CASE], Contender]] = {
    "sbx": lambda case: baselines_sac("sbx", case),
    "sb3": lambda case: baselines_sac("stable_baselines3", case),
    "d3rlpy": d3rlpy,
}

if __name__ == "__main__":
    serve(PEERS[sys.argv[1]], json.loads(sys.argv[2]))
