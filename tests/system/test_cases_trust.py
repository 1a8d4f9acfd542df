"""Files from elsewhere: the code that they name does not run, what changed is noticed; own files need no word."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from o2o import envs, trust
from o2o.cli import main
from o2o.data import datasets
from o2o.errors import ConfigError, O2OError, TrustError
from o2o.runs import session
from o2o.runs.session import RunConfig

Maker = Callable[..., RunConfig]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def foreign(embedded: str, tmp_path: Path) -> Path:
    """Return a copy of the embedded dataset, as if it came from somebody else."""
    shutil.copytree(datasets.default_root() / embedded, tmp_path / "foreign-v0")
    return tmp_path / "foreign-v0"


def change_spec(dataset: Path, key: str = "env_spec", **changes: Any) -> None:
    """Change a specification in the metadata of a dataset."""
    path = dataset / "data" / "metadata.json"
    about = json.loads(path.read_text())
    about[key] = json.dumps({**json.loads(about["env_spec"]), **changes})
    if key == "env_spec":
        about.pop("eval_env_spec", None)
    path.write_text(json.dumps(about))


def change_config(run: Path, **changes: Any) -> None:
    """Change a run's config.json."""
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def touch(path: Path) -> dict[str, Any]:
    """Return a specification's fields that run a command."""
    return {"id": "Theirs-v0", "entry_point": "os:system", "kwargs": {"command": f"touch {path}"}}


@pytest.mark.parametrize("key", ["env_spec", "eval_env_spec"])
def test_command_in_dataset(key: str, foreign: Path, tiny_run: Maker, tmp_path: Path) -> None:
    """A dataset's environment that is a command is refused in training and in evaluation, and does not run."""
    run, harm = tiny_run("bc", dataset=(str(foreign),), offline_steps=5, online_steps=0), tmp_path / "harm"
    assert session.train(run, tmp_path / "run")
    change_spec(foreign, key, **touch(harm))
    for act in (
        lambda: session.train(run, tmp_path / "other"),
        lambda: envs.make(datasets.info(foreign)),
    ):
        with pytest.raises(TrustError, match=r"would run os:system as its environment Theirs-v0.*`env` MODULE:Theirs"):
            act()
    assert len(session.evaluate_run(tmp_path / "run", 1)) == 1  # a run knows its environment
    held = tmp_path / "run/dataset.json"
    values = json.loads(held.read_text())
    values["dataset"]["metadata"] = json.loads((foreign / "data/metadata.json").read_text())
    held.write_text(json.dumps(values))
    with pytest.raises(TrustError, match="would run os:system as its environment Theirs-v0"):
        session.evaluate_run(tmp_path / "run", 1)
    assert not harm.exists() and not (tmp_path / "other").exists()


def test_registry_code_wins(foreign: Path, tmp_path: Path) -> None:
    """Under a registered id the registry's environment is made, whatever code the dataset names; its settings hold."""
    harm = {**touch(tmp_path / "harm"), "id": "InvertedPendulum-v5", "kwargs": {"reset_noise_scale": 0.0}}
    change_spec(foreign, "eval_env_spec", **harm, max_episode_steps=7)
    spec = envs.specification(datasets.info(foreign))
    assert spec.entry_point == gym.spec("InvertedPendulum-v5").entry_point
    assert (spec.kwargs, spec.max_episode_steps) == ({"reset_noise_scale": 0.0}, 7)
    change_spec(foreign, "eval_env_spec", id="mine:InvertedPendulum-v5", entry_point=spec.entry_point)
    assert envs.specification(datasets.info(foreign)).entry_point == spec.entry_point  # a registered one's, no import


def test_command_in_wrapper(foreign: Path, tmp_path: Path) -> None:
    """A wrapper that is a command is refused and does not run."""
    wrapper = {"name": "W", "entry_point": "os:system", "kwargs": {"command": f"touch {tmp_path / 'harm'}"}}
    change_spec(foreign, "eval_env_spec", additional_wrappers=[wrapper])
    with pytest.raises(O2OError, match="with wrappers around it"):
        envs.make(datasets.info(foreign))
    assert not (tmp_path / "harm").exists()


def evil(tmp_path: Path) -> Path:
    """Write a module that leaves a mark when it is imported."""
    (tmp_path / "evil_module.py").write_text(
        f"open({str(tmp_path / 'harm')!r}, 'w')\ndef act(observation):\n    return 0 * observation['desired_goal']\n"
    )
    return tmp_path / "evil_module.py"


def test_code_in_foreign_run(tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No door runs the code that a foreign run folder names: as an environment's module or a base policy."""
    monkeypatch.chdir(tmp_path)
    path = evil(tmp_path)
    assert session.train(tiny_run("bc", offline_steps=5, online_steps=0), tmp_path / "run")
    for change in ({"env": "evil_module:Any-v0"}, {"base": f"{path}:act"}, {"base": "evil_module:act"}):
        change_config(tmp_path / "run", **{"env": None, "base": None, **change})
        for act in (
            lambda: session.evaluate_run(tmp_path / "run", 1),
            lambda: session.resume(tmp_path / "run"),
            lambda: session.load_policy(tmp_path / "run"),
            lambda: session.load_base(tmp_path / "run"),
            lambda: session.train(tiny_run("wsrl", init_from=str(tmp_path / "run")), tmp_path / "next"),
        ):
            with pytest.raises(TrustError, match=r"would run .*evil_module.*put its folder into O2O_TRUST.*--trust"):
                act()
    change_config(tmp_path / "run", base="os:system", env=None)
    with pytest.raises(TrustError, match="would run os:system"):
        session.resume(tmp_path / "run")
    assert not (tmp_path / "harm").exists() and not (tmp_path / "next").exists()
    change_config(tmp_path / "run", base=None, env="tests.helpers.tiny:InvertedPendulum-v5")  # imported by this program
    with pytest.raises(O2OError, match="environment InvertedPendulum-v5 cannot be made"):
        session.evaluate_run(tmp_path / "run", 1)


def test_own_code_needs_no_word(
    tiny_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run whose base policy the user named resumes and evaluates; for another user only with trust."""
    caplog.set_level("WARNING", "o2o")
    path, harm = evil(tmp_path), tmp_path / "harm"
    run = tiny_run("residual", base=f"{path}:act", offline_steps=2, online_steps=0)
    assert session.train(run, tmp_path / "run")
    assert session.resume(tmp_path / "run")
    assert len(session.evaluate_run(tmp_path / "run", 1)) == 1
    assert not [row for row in caplog.records if row.name.startswith("o2o")]
    path.write_text(path.read_text() + "# changed\n")
    session.load_policy(tmp_path / "run")
    assert "evil_module.py:act changed since run" in caplog.text
    harm.unlink()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another user"))
    command = ["eval", str(tmp_path / "run"), "--episodes", "1"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2 and not harm.exists()
    with monkeypatch.context() as patch:
        patch.setenv(trust.FOLDERS, os.pathsep.join([str(tmp_path / "not here"), str(tmp_path)]))
        assert len(session.evaluate_run(tmp_path / "run", 1)) == 1
    with pytest.raises(SystemExit) as ended:
        main([*command, "--trust"])
    assert ended.value.code == 0 and harm.exists()
    monkeypatch.setenv(trust.FOLDERS, str(tmp_path / "not here"))
    with pytest.raises(TrustError):
        session.load_policy(tmp_path / "run")


def test_voucher_is_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A voucher holds for the file that its name led to, not for another file of that name elsewhere."""
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vouched_arm.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path / "mine")
    proof = trust.voucher(["vouched_arm:Arm-v0"])
    assert proof is not None and trust.vouched(proof, ["vouched_arm:Arm-v0"])
    assert not trust.vouched(proof, ["vouched_arm:Other-v0"]) and not trust.vouched("", ["vouched_arm:Arm-v0"])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path / "mine")])
    monkeypatch.chdir(tmp_path / "theirs")
    assert not trust.vouched(proof, ["vouched_arm:Arm-v0"])


ARM = """
import gymnasium as gym
import numpy as np

class Arm(gym.Env):
    observation_space = gym.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}

gym.register("OwnTrustedArm-v0", "own_trusted_arm:Arm", max_episode_steps=5)
"""
WRITE = """
import sys, numpy as np, gymnasium as gym, own_trusted_arm
from o2o.data import datasets
env = gym.make("OwnTrustedArm-v0")
episodes = list(datasets.record(env, lambda *_: np.zeros(1, np.float32), 10))
datasets.write("own/arm-v0", episodes, observation_space=env.observation_space, action_space=env.action_space,
               spec=env.spec, root=sys.argv[1])
"""
MAKE = """
import sys
from o2o import envs
from o2o.data import datasets
envs.make(datasets.info(sys.argv[1] + "/own/arm-v0")).reset(seed=0)
"""


def test_own_dataset_needs_no_word(tmp_path: Path) -> None:
    """A dataset that the user recorded names its environment's module; for another user it may not run."""
    (tmp_path / "own_trusted_arm.py").write_text(ARM)

    def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
        setting = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env}
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, env=setting, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert (made := run(WRITE)).returncode == 0, made.stderr
    assert (own := run(MAKE)).returncode == 0, own.stderr
    other = run(MAKE, XDG_DATA_HOME=str(tmp_path / "another user"))
    assert other.returncode == 1 and "TrustError: dataset own/arm-v0 would run own_trusted_arm:Arm" in other.stderr
    assert run(MAKE, XDG_DATA_HOME=str(tmp_path / "x"), **{trust.FOLDERS: str(tmp_path)}).returncode == 0


def test_changed_data_is_noticed(foreign: Path, tiny_run: Maker, tmp_path: Path) -> None:
    """A dataset that changed since a run began stops whoever reads it again; the policy acts as before."""
    assert session.train(tiny_run("bc", dataset=(str(foreign),), offline_steps=5, online_steps=0), tmp_path / "run")
    before = session.evaluate_run(tmp_path / "run", 1)
    shutil.rmtree(foreign)
    about = datasets.info(tiny_run("bc").dataset[0])
    assert about.env_spec is not None
    inside = gym.make(about.env_spec)
    inside.action_space.seed(0)
    episodes = list(datasets.record(inside, lambda *_: inside.action_space.sample(), 60))
    spaces = {"observation_space": inside.observation_space, "action_space": inside.action_space}
    datasets.write("foreign-v0", episodes, **spaces, spec=about.env_spec, root=tmp_path)
    for act in (lambda: session.open_run(tmp_path / "run"), lambda: session.resume(tmp_path / "run")):
        with pytest.raises(ConfigError, match=r"dataset .*foreign-v0 changed since run .*run began.*restore the data"):
            act()
    assert session.evaluate_run(tmp_path / "run", 1) == before
    inside.close()


def test_changed_base_is_noticed(tiny_run: Maker, tmp_path: Path) -> None:
    """A base that has learnt since a run began stops whoever acts with the run."""
    for name, seed in (("base", 0), ("other", 1)):
        assert session.train(tiny_run("bc", seed=seed, offline_steps=5, online_steps=0), tmp_path / name)
    run = tiny_run("residual", base=str(tmp_path / "base"), offline_steps=2, online_steps=0)
    assert session.train(run, tmp_path / "run")
    policy = session.load_policy(tmp_path / "run")
    assert np.isfinite(policy.act(envs.make(datasets.info(run.dataset[0])).unwrapped.observation_space.sample())).all()
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "other").rename(tmp_path / "base")
    for act in (lambda: session.evaluate_run(tmp_path / "run", 1), lambda: session.load_policy(tmp_path / "run")):
        with pytest.raises(ConfigError, match=r"base .*base changed since run .*run began; restore it as it was"):
            act()
