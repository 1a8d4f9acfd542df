"""OGBench's published curves: what their settings share, for the `paper` presets of several agents; not an agent.

Source: the code of QAM (arXiv 2601.14234, ColinQiyangLi/qam), 17 methods, 12 seeds. Chunks of 5 actions, ten critics of
4x512 GELU units with LayerNorm behind the activation, values of mean - 0.5 std, batches of 256, Adam 3e-4, discount
0.99. 1M updates, then 500k environment steps, one update each from step 5000 on, in one buffer that starts with the
dataset. How policies are judged is the same for all agents: `o2o.runs.presets.PUBLISHED_LOOP`.

Rewards are -1/0 on scene and puzzle: take the dataset whose name ends with `-sparse`. They are dense on cube. The
published puzzle-4x4 curves, and the settings of puzzle-4x4 here, are for a set 100 times as large. The curves lack
cube-single: it has cube-double's settings. Dataset ids such as `ogbench/scene-play-singletask-task1` choose a preset.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from o2o.types import OnlineConfig, Preset

DOMAINS = ("cube single", "cube double", "cube triple", "scene", "puzzle 3x3", "puzzle 4x4")
WIDTHS = (512, 512, 512, 512)
CHUNKS: dict[str, Any] = {"chunk": 5, "pad_terminal": False}
"""Windows that an episode's end cuts short are dropped; a goal amid an episode cuts none (see the task's masks)."""
ONLINE = OnlineConfig(warmup_steps=5000, replay="append")


def presets(
    config: Any, domains: Mapping[str, Mapping[str, Any]], updates: int = 1_000_000, steps: int = 500_000
) -> dict[str, Preset]:
    """Return `Preset.tasks` of `DOMAINS`: `config`, with the fields of a domain's own; cube-single is cube-double's."""
    found = {}
    for domain in DOMAINS:
        own = domains.get(domain, domains.get("cube double", {}) if domain == "cube single" else {})
        found[f"{domain} play"] = Preset(replace(config, **own), updates, steps)
    return found
