"""The ids `playground/NAME-v0`: DM-control in JAX, as MuJoCo Playground has it (`o2o.simulators.playground`)."""

import gymnasium as gym

TASKS = (
    "AcrobotSwingup", "AcrobotSwingupSparse", "BallInCup", "CartpoleBalance", "CartpoleBalanceSparse",
    "CartpoleSwingup", "CartpoleSwingupSparse", "CheetahRun", "FingerSpin", "FingerTurnEasy", "FingerTurnHard",
    "FishSwim", "HopperHop", "HopperStand", "HumanoidRun", "HumanoidStand", "HumanoidWalk", "PendulumSwingup",
    "PointMass", "ReacherEasy", "ReacherHard", "SwimmerSwimmer6", "WalkerRun", "WalkerStand", "WalkerWalk",
)  # fmt: skip
"""The tasks of Playground 0.2."""


def register() -> None:
    """Let Gymnasium know the ids. Playground is imported when one is made; it needs `pip install 'o2o[playground]'`."""
    for name in TASKS:
        entry = "o2o.simulators.playground:make"
        gym.register(f"playground/{name}-v0", entry, max_episode_steps=1000, kwargs={"name": name})
