"""The advice of a diagnosis can be followed: its command starts, whatever the run's agent and networks."""

import dataclasses
import shlex
from pathlib import Path

import pytest

import o2o
from o2o import cli
from o2o.config import LoopConfig
from o2o.runs import session
from o2o.runs.diagnosis import judge
from tests.system.test_cases_diagnosis import numbers

LOOP = LoopConfig(eval_every=0, eval_episodes=1, eval_envs=1)


@pytest.mark.parametrize(("agent", "starts"), [("wsrl", True), ("iql", False)])
def test_advice_starts(agent: str, starts: bool, embedded: str, tmp_path: Path) -> None:
    """WSRL is named for runs that it can start from, and then it does; the others go on as they are."""
    run = session.preset_run(agent, embedded, "small", offline_steps=2, online_steps=0, episode_limit=8, loop=LOOP)
    assert session.train(run, tmp_path / "run")
    found = o2o.diagnose(tmp_path / "run", episodes=1)
    assert found["starts_wsrl"] is starts
    found["policy"]["mode"]["score"] = found["policy"]["up"]["score"] = 0.9  # as if it had learnt
    command = judge(found, tmp_path / "run")["recommendation"]["command"]
    words = shlex.split(command)
    if not starts:
        assert words[:2] == ["o2o", "resume"] and words[2] == str(tmp_path / "run")
        assert judge(found, "a")["recommendation"]["critic_only_updates"] == 0, "to go on has no such phase"
        return
    assert words[:3] == ["o2o", "train", "wsrl"]
    _, config = cli.parse_train("wsrl", words[3:])
    data = session.load_data(config)
    trainer = session.build(dataclasses.replace(config, online_steps=10), data)
    trainer.close()
    assert config.init_from == str(tmp_path / "run")


def test_mode_alone_fails() -> None:
    """Of a policy whose mode fails nothing is promised; and no reason speaks against another."""
    found = numbers(mode=0.0, up=0.0)
    found["policy"]["sample"].update(score=0.2, success=0.2)
    judged = judge(found, "a")
    assert judged["dip"] is None and "mode never succeeds" in " ".join(judged["recommendation"]["reasons"])
    dips = judge(numbers(up=0.0), "a")["recommendation"]
    assert dips["keep_data"] and not any("do without" in reason for reason in dips["reasons"])


@pytest.mark.parametrize(
    ("forms", "q", "rise", "dip"),
    [
        ({"mode": 0.1, "sample": 0.1, "random": 0.0, "up": 0.0, "data": 0.29}, (1.5, 0.857), 0.06, None),
        ({"mode": 0.3, "sample": 0.05, "random": 0.25, "up": 0.0, "data": 0.29}, (1.7, 0.882), 0.19, True),
        ({"mode": 0.8, "sample": 0.8, "random": 0.85, "up": 0.8, "data": 0.345}, (1.2, 0.444), 0.011, False),
        ({"mode": 0.2, "sample": 0.25, "random": 0.2, "up": 0.25, "data": 0.345}, (2.5, 0.4), 0.002, False),
    ],
    ids=["wsrl-door-fell-from-little", "iql-door-fell", "iql-maze-kept", "calql-maze-kept"],
)
def test_known_outcomes(forms: dict[str, float], q: tuple[float, float], rise: float, dip: bool) -> None:
    """The measured numbers of runs whose outcome is known are judged right; where they come from: docs/switch.md."""
    found = numbers(rise=rise, bias=q[0])
    found["q"]["rollouts"]["correlation"] = q[1]
    for name, score in forms.items():
        found["policy"][name].update(score=score, success=score, error=(score * (1 - score) / 20) ** 0.5)
    judged = judge(found, "a")
    assert judged["dip"] is dip
    assert judged["recommendation"]["agent"] == ("wsrl" if dip is False else "residual")
    assert ("lost 100 % of its score, and 20 episodes" in judged["unsaid"]) is (dip is None)
