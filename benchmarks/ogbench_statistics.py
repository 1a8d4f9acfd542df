"""Statistics of made OGBench play sets side by side: two seeds of one generator should differ by sampling alone.

    o2o data make ogbench/scene-play --steps 20000 --seed 0 --root A     # and so on, seed 1 in B
    python benchmarks/ogbench_statistics.py A B --scenes scene-play puzzle-3x3-play cube-single-play

It writes `results/ogbench/statistics.md`. Differences are given in standard errors over episodes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from o2o.data import files, views
from o2o.data.files import Episode
from o2o.data.task import Part, judge
from o2o.envs.ogbench import ARM, CUBE, PLAYS, STATES, play_id

ACTIONS = ("x", "y", "z", "yaw", "gripper")
OUT = Path(__file__).parent / "results/ogbench/statistics.md"


def episodes_of(name: str, root: Path) -> list[Episode]:
    """Return all episodes of a set with the simulator's states."""
    folder = files.locate(name, root)
    about = files.read_info(folder)
    return list(files.read_episodes(files.open_storage(folder, about.metadata), about.name, states=STATES))


def statistics(episodes: Sequence[Episode], goals: dict[str, tuple[Part, ...]], cubes: int) -> dict[str, np.ndarray]:
    """Return each statistic's value in every episode, `[episodes]`, by name."""
    found: dict[str, list[float]] = {}
    for episode in episodes:
        states = episode.states or {}
        row = {"length": float(len(episode.rewards))}
        for i, name in enumerate(ACTIONS):
            row[f"action {name}: mean"] = float(episode.actions[:, i].mean())
            row[f"action {name}: mean square"] = float((episode.actions[:, i] ** 2).mean())
            row[f"action {name}: share at a bound"] = float((np.abs(episode.actions[:, i]) >= 0.99999).mean())
        for i in range(cubes):
            place = states["qpos"][:, ARM + CUBE * i : ARM + CUBE * i + 3]
            row[f"cube {i + 1}: way (m)"] = float(np.linalg.norm(np.diff(place, axis=0), axis=1).sum())
            row[f"cube {i + 1}: height (m)"] = float(place[:, 2].mean())
            row[f"cube {i + 1}: share lifted above 5 cm"] = float((place[:, 2] > 0.05).mean())
        if "button_states" in states:
            row["buttons: changes"] = float(np.abs(np.diff(states["button_states"].astype(int), axis=0)).sum())
        if "drawer" in goals:
            for name, entry in (("drawer", -2), ("window", -1)):
                row[f"{name}: way (m)"] = float(np.abs(np.diff(states["qpos"][:, entry])).sum())
        for task, goal in goals.items():
            if goal:
                rewards, reached = judge(goal, {key: value[:-1] for key, value in states.items()})
                row[f"{task}: mean reward"] = float(rewards.mean())
                row[f"{task}: share of steps at the goal"] = float(reached.mean())
        for key, value in row.items():
            found.setdefault(key, []).append(value)
    return {key: np.asarray(values) for key, values in found.items()}


def table(scene: str, roots: Sequence[Path]) -> list[str]:
    """Return the Markdown section of a scene."""
    sets, infos = [], []
    for root in roots:
        name = play_id(scene)[0]
        infos.append(about := files.info(name, root))
        known = views.tasks(about.metadata).items()
        goals = {task: tuple(map(Part.from_json, entry["goal"])) for task, entry in known if task != "singletask"}
        first = next(iter(goals.values()))
        cubes = sum(len(part.entries) == 3 for part in first)
        sets.append(
            statistics(episodes_of(name, root), goals | ({"drawer": ()} if scene == "scene-play" else {}), cubes)
        )
    made = [about.metadata for about in infos]
    versions = "; ".join(dict.fromkeys(", ".join(f"{k} {v}" for k, v in m["made_with"].items()) for m in made))
    seeds = [str(m["recipe"]["seed"]) for m in made]
    lines = [f"## {scene}", "", f"{infos[0].episodes} episodes for each seed; {versions}.", ""]
    lines += [
        f"| statistic | seed {seeds[0]} | seed {seeds[1]} | difference / its standard error |",
        f"|{' --- |' * 4}",
    ]
    scores = []
    for key in sets[0]:
        a, b = sets[0][key], sets[1][key]
        error = float(np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
        score = None if error == 0 else float((b.mean() - a.mean()) / error)
        scores += [score] if score is not None else []
        lines.append(f"| {key} | {a.mean():.4g} | {b.mean():.4g} | {'-' if score is None else f'{score:+.1f}'} |")
    beyond = sum(abs(score) > 2 for score in scores)
    return [*lines, "", f"{beyond} of {len(scores)} differences are beyond 2 standard errors.", ""]


def main() -> None:
    """Write the tables of some scenes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", type=Path, nargs=2, help="two roots of datasets, made with two seeds")
    parser.add_argument("--scenes", nargs="+", default=list(PLAYS), choices=list(PLAYS))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    lines = [
        "# Statistics of generated play data",
        "",
        "Two seeds of each scene side by side, made by `o2o data make ogbench/SCENE --steps 20000`. Each figure is the",
        "mean over episodes. Of equal distributions 5 % of the differences lie beyond 2 standard errors by chance;",
        "the rows of a scene depend on each other. The authors' own counts are not published, so this shows that two",
        "draws agree. That the rewards are the environment's is a test (`tests/unit/test_cases_ogbench.py`).",
        "",
    ]
    for scene in arguments.scenes:
        lines += table(scene, arguments.roots)
    lines += ["Made by `python benchmarks/ogbench_statistics.py`.", ""]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
