"""OGBench's published curves: what their settings share, for the `paper` presets of several agents; not an agent.

Source: the code of QAM (arXiv 2601.14234, ColinQiyangLi/qam), 17 methods, 12 seeds. Chunks of 5 actions, ten critics of
4x512 GELU units with LayerNorm behind the activation, values of mean - 0.5 std, batches of 256, Adam 3e-4, discount
0.99. 1M updates, then 500k environment steps, one update each from step 5000 on, in one buffer that starts with the
dataset. How policies are judged is the same for all agents: `o2o.runs.presets.PUBLISHED_LOOP`.

Rewards are -1/0 on scene and puzzle: take the dataset whose name ends with `-sparse`. They are dense on cube. The
published curves of cube-quadruple and puzzle-4x4, and the settings of both here, are for sets 100 times as large. The
curves lack cube-single: it has cube-double's settings. Dataset ids such as `ogbench/scene-play-singletask-task1` choose
a preset. Mazes are played by single actions; a discount of 0.995 and, for the humanoid, rho 0 are published there.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from o2o.types import OnlineConfig, Preset

MANIPULATION = ("cube single", "cube double", "cube triple", "cube quadruple", "scene", "puzzle 3x3", "puzzle 4x4")
_FAR = {"chunk": 1, "discount": 0.995}
MAZES: dict[str, dict[str, Any]] = {
    "antmaze large": {"chunk": 1},
    "antmaze giant": _FAR,
    "humanoidmaze medium": {**_FAR, "rho": 0.0},
    "humanoidmaze large": {**_FAR, "rho": 0.0},
}
"""What all agents have there; their field for rho may have another name."""
WIDTHS = (512, 512, 512, 512)
CHUNKS: dict[str, Any] = {"chunk": 5, "pad_terminal": False}
"""Windows that an episode's end cuts short are dropped; a goal amid an episode cuts none (see the task's masks)."""
ONLINE = OnlineConfig(warmup_steps=5000, replay="append")


def presets(
    config: Any,
    domains: Mapping[str, Mapping[str, Any]],
    updates: int = 1_000_000,
    steps: int = 500_000,
    rho: str | None = "pessimism",
) -> dict[str, Preset]:
    """Return `Preset.tasks` of all domains: `config`, with the fields of a domain's own; cube-single is cube-double's.

    `rho` is the config's field for the standard deviations below the critics' mean; `None` leaves mazes out.
    """
    found = {}
    for domain in MANIPULATION:
        own = domains.get(domain, domains.get("cube double", {}) if domain == "cube single" else {})
        found[f"{domain} play"] = Preset(replace(config, **own), updates, steps)
    if rho is None:
        return found
    for domain, shared in MAZES.items():
        own = {rho if name == "rho" else name: value for name, value in shared.items()}
        found[f"{domain} navigate"] = Preset(replace(config, **own, **domains.get(domain, {})), updates, steps)
    return found
