"""The page of a diagnosis (`o2o diagnose`): a table, a picture, what to do and why. Nothing is computed here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from o2o.errors import RunError
from o2o.files import write_atomically
from o2o.report.plots import COLORS, GRID, INK, LABELS, save_picture

PAGE, PICTURE, NUMBERS = "README.md", "diagnosis.png", "diagnosis.json"
FORMS = {
    "data": "the data",
    "mode": "the policy",
    "sample": "sampled",
    "random": "moved at random",
    "up": "moved up Q",
}
"""What is compared, in the order of the page."""


def write(folder: Path, found: Mapping[str, Any], points: Mapping[str, np.ndarray]) -> None:
    """Write page, picture and numbers into `folder`; `points` are Q and returns of rows. Raises `RunError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_picture(draw(found, points), folder / PICTURE)
        write_atomically(folder / NUMBERS, json.dumps(found, indent=2, allow_nan=False) + "\n")
        write_atomically(folder / PAGE, page(found) + f"\n![Q and returns, Q around the policy]({PICTURE})\n")
    except OSError as error:
        raise RunError(f"the diagnosis cannot be written to {folder}: {error.strerror}") from error


def number(value: float | None) -> str:
    """Return a number with three digits, `-` for none."""
    return "-" if value is None else f"{value:.3g}"


def headline(found: Mapping[str, Any]) -> str:
    """Return what is expected at the switch, in one sentence."""
    if found["dip"] is None:
        return f"Whether it will dip cannot be said: {found['unsaid']}"
    return "A dip is likely when it goes online." if found["dip"] else "No dip is expected when it goes online."


def page(found: Mapping[str, Any]) -> str:
    """Return the page as Markdown, without its picture: one screen."""
    advice, policy = found["recommendation"], found["policy"]
    lines = [
        f"# Diagnosis of {found['run']}",
        "",
        f"{found['agent']} at step {found['checkpoint']}, {found['episodes']} episodes each. **{headline(found)}**",
        "",
        "| | return | success | normalised | steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, words in FORMS.items():
        if name in policy:
            cells = (number(policy[name].get(key)) for key in ("return", "success", "normalized", "length"))
            lines.append(f"| {words} | {' | '.join(cells)} |")
    lines.append("")
    if found["q"] is not None:
        lines += [
            "| Q against returns | Q | return | bias | error | correlation |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, words in (("data", "rows of the data"), ("rollouts", "the policy's own episodes")):
            cells = (number(found["q"][name][key]) for key in ("q", "return", "bias", "rmse", "correlation"))
            lines.append(f"| {words} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"- {'**!** ' if sign['warns'] else ''}{sign['says']}" for sign in found["signs"]]
    alone = (
        f"{advice['critic_only_updates']} (`{advice['critic_warmup']}`)" if advice["critic_only_updates"] else "none"
    )
    lines += [
        "",
        "## What to do",
        "",
        f"Agent `{advice['agent']}`; keep the data: {'yes' if advice['keep_data'] else 'no'}; warm-up: "
        f"{advice['warmup_steps']} steps; critic-only updates: {alone}.",
        "",
        *(f"- {reason}" for reason in advice["reasons"]),
        "",
        f"    {advice['command']}",
    ]
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Any], points: Mapping[str, np.ndarray]) -> Figure:
    """Return the picture: scores of the forms of the policy; with a Q also Q against returns, and Q around actions."""
    panels = 3 if points else 1
    figure = Figure(figsize=(4.3 * panels, 3.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _scores(axes[0], found)
    if points:
        _calibration(axes[1], points)
        _around(axes[2], found)
    for each in axes:
        each.grid(color=GRID, linewidth=0.7)
        each.set_axisbelow(True)
        each.tick_params(colors=INK, length=3, labelsize=8)
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found['run']}: {headline(found)}", fontsize=10, color=INK, x=0.01, ha="left")
    return figure


def _scores(axes: Axes, found: Mapping[str, Any]) -> None:
    policy = found["policy"]
    shown = {name: words for name, words in FORMS.items() if name in policy and policy[name]["score"] is not None}
    scores = [policy[name]["score"] for name in shown]
    errors = [2.0 * policy[name].get("error", 0.0) for name in shown]
    colors = ["#999999" if name == "data" else COLORS[0] if name == "mode" else COLORS[4] for name in shown]
    axes.barh(list(shown.values())[::-1], scores[::-1], xerr=errors[::-1], color=colors[::-1], ecolor=INK)
    axes.set_title("What is lost by small moves", fontsize=9, loc="left")
    axes.set_xlabel(LABELS[found["judged_by"]])


def _calibration(axes: Axes, points: Mapping[str, np.ndarray]) -> None:
    for name, color, words in (("data", "#999999", "the data"), ("own", COLORS[1], "the policy's episodes")):
        axes.scatter(points[f"{name}_g"], points[f"{name}_q"], s=6, color=color, alpha=0.5, linewidths=0, label=words)
    ends = [min(float(x.min()) for x in points.values()), max(float(x.max()) for x in points.values())]
    axes.plot(ends, ends, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set(xlabel="Monte-Carlo return", ylabel="Q")
    axes.set_title("Q against returns", fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8)


def _around(axes: Axes, found: Mapping[str, Any]) -> None:
    around = found["actions"]
    axes.plot(around["walk"], around["walk_gain"], color=COLORS[1], label="walk up Q")
    axes.plot(around["radii"], around["best_gain"], color=COLORS[0], marker="o", markersize=4, label="best neighbour")
    axes.plot(around["radii"], around["mean_gain"], color=COLORS[2], marker="s", markersize=4, label="mean neighbour")
    axes.axhline(
        -around["policy_above_data"], color="#777777", linewidth=1.0, linestyle=":", label="the data's actions"
    )
    axes.set(xlabel="distance from the policy's action", ylabel="Q above the policy's action")
    axes.set_title("Q around the policy", fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8)
