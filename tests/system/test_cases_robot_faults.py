"""A robot that breaks: a MuJoCo arm in its own process, in real time, behind a socket, with a lab's driver and guards.

`benchmarks/robot_faults.py` tries every fault with learner and actor in processes of their own.
"""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import arm_robot  # pyright: ignore[reportMissingImports]
from robot_faults import FAULTS, OUT, Arm, identity

from o2o.config import to_dict
from o2o.data import datasets
from o2o.errors import EnvironmentFaultError
from o2o.nn.kernels import each_seed
from o2o.runs import actor, session
from o2o.train.feed import packed_agents
from o2o.train.link import Hub, Row, shared_key
from o2o.train.programs import to_online
from o2o.train.spool import Spool


@pytest.fixture
def arm() -> Iterator[Arm]:
    arm = Arm()
    yield arm
    arm.close()


@pytest.fixture
def hub(arm: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a learner that learns nothing: it offers an agent, and receives."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    env = gym.make("TableArm-v0", address=arm.address)
    episodes = list(datasets.record(env, lambda seen, _: arm_robot.demonstrate(seen), 2))
    env.close()
    assert all(episode.rewards[-1] == 1 for episode in episodes), "a demonstration reaches the goal"
    about: dict[str, Any] = {"observation_space": env.observation_space, "action_space": env.action_space}
    datasets.write("lab/table-arm-v0", episodes, **about, spec=env.spec)
    run = session.preset_run("rlpd", "lab/table-arm-v0", "small", env="arm_robot:TableArm-v0")
    narrow = [("actor_hidden_dims", (16, 16)), ("critic_hidden_dims", (16, 16))]
    run = session.with_fields(run, {"config": dict(narrow), "offline_estimate": True, "online_steps": 0})
    data = session.load_data(run)
    hub = Hub(("127.0.0.1", 0), shared_key("127.0.0.1"))
    trainer = session.build(run, data)
    hub.publish(0, packed_agents(each_seed(to_online, trainer.agent), None, env_steps=0, random=0))
    trainer.close()
    hub.start(
        {"run": "one", "settings": to_dict(run), "dataset": {"dataset": json.loads(json.dumps(data.to_json()))}}, {}
    )
    yield hub
    hub.close()


def test_hung_sensor_and_dead_controller(arm: Arm, hub: Hub, tmp_path: Path) -> None:
    """A sensor that hangs stops the arm within 0.4 s; a controller that dies ends the actor. All recorded is sent."""
    spool = tmp_path / "spool"

    def act(**options: Any) -> actor.Acted:
        learner, where = f"127.0.0.1:{hub.address[1]}", (f"address={arm.address}",)
        return actor.act("arm_robot:TableArm-v0", learner, spool, env_kwargs=where, **options)

    def happens(fault: str) -> None:
        arm.moving(commands=15)
        arm.tell(fault=fault)

    for fault, noticed in (
        ("hang", "stale: the observation has not changed for 5 steps"),
        ("die", "controller hung up"),
    ):
        breaking = threading.Thread(target=happens, args=(fault,))
        breaking.start()
        with pytest.raises(EnvironmentFaultError, match=noticed):
            act()
        breaking.join()
        if fault == "hang":
            report = arm.report()
            assert report["why"] == "told to" and 0.05 < report["still_after_s"] < 0.4
            arm.tell(fault=None)
    arm.close()
    again = Arm(arm.port)
    done = act(episodes=1)
    again.close()
    assert done.waiting == 0 and done.episodes == 1
    kept = Spool(spool)
    recorded = [Row.unpacked("", 1 + i, entry) for i, entry in enumerate(kept.read(0, 1000))]
    kept.close()
    received = [row for row in iter(lambda: (hub.take(0.0) or [None])[0], None)]
    assert [row.number for row in received] == list(range(1, len(recorded) + 1)) and len(recorded) > 2 * 15
    for sent, had in zip(recorded, received, strict=True):
        assert identity(sent.values) == identity(had.values)
    assert len({identity(row.values) for row in received}) == len(recorded), "encoders are noisy: each is another"
    starts = [row.episode for row in received if row.step == 0]
    assert len(starts) == len(set(starts)) >= 3


def test_committed_table_has_every_fault() -> None:
    """The committed table has tried every fault; nothing was lost, or stored twice."""
    found = json.loads((OUT / "faults.json").read_text())
    assert [row["fault"] for row in found["faults"]] == [fault.name for fault in FAULTS]
    assert found["lost"] == found["twice"] == 0 and found["in_order"] and found["recorded"] == found["stored"] > 500
    went_on = {row["fault"] for row in found["faults"] if row["robot"] == "went on"}
    assert {"frames 30 ms late", "30 % of the frames dropped"} <= went_on
    still = {row["fault"]: row["still_after_ms"] for row in found["faults"] if row["still_after_ms"] is not None}
    finished = {name for name in still if name.startswith("learner killed")}  # the robot ends its episode before
    assert all(still[name] < (3000 if name in finished else 1500) for name in still)
