"""Plots of learning curves, one line with its interval per method, and the reading of the rows behind them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from o2o.errors import ConfigError, RunError
from o2o.report.stats import Band, Curve, curve, statistic_of

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""The palette of Okabe and Ito, for any colour vision; `MARKERS` tell the lines apart on grey prints."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABELS = {
    "return": "return",
    "success": "success rate",
    "success_last": "success rate (last step)",
    "normalized": "normalised score",
    "score": "task's own score",
    "length": "episode length (steps)",
    "intervention": "share of steps by a human",
    "action_error": "action error on held-out episodes",
}
INK, GRID, SHADE = "#333333", "#dddddd", "#f3f3f0"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a jsonl file. A last line that a kill cut off is left out. Raises `RunError`."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; expected a run folder with evaluation rows") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise RunError(f"{path}, line {number}: not JSON ({error.msg}); delete that line or the run") from error
    return rows


def pool(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the episode rows of several run folders with one `seed` number for each pair of run and seed.

    In the files, the seeds of every run count from 0. Raises `RunError`.
    """
    numbers: dict[tuple[int, int], int] = {}
    rows = [(run, row) for run, path in enumerate(runs) for row in read_rows(path / "episodes.jsonl")]
    for place in sorted({(run, row["seed"]) for run, row in rows}):
        numbers[place] = len(numbers)
    return [{**row, "seed": numbers[run, row["seed"]]} for run, row in rows]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises `RunError`."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}; expected a run folder") from error


def _draw(axes: Axes, band: Band, index: int, label: str) -> None:
    if band.steps.size == 0:
        return
    color = COLORS[index % len(COLORS)]
    marker = MARKERS[index % len(MARKERS)]
    axes.fill_between(band.steps, band.low, band.high, color=color, alpha=0.16, linewidth=0)
    axes.plot(
        band.steps,
        band.centre,
        color=color,
        linewidth=1.9,
        marker=marker,
        markersize=4.5,
        markevery=max(1, band.steps.size // 12),
        markeredgecolor="white",
        markeredgewidth=0.6,
        label=label,
    )


def _dress(axes: Axes, title: str, xlabel: str, bands: Sequence[Band]) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(xlabel, color=INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    right = max((float(band.steps[-1]) for band in bands if band.steps.size), default=0.0)
    margin = 0.02 * (right or 1.0)
    axes.set_xlim(-margin, (right or 1.0) + margin)


def _limits(curves: Sequence[Curve], metric: str) -> tuple[float, float]:
    bands = [band for item in curves for band in (item.offline, item.online)]
    low = min((float(np.min(band.low)) for band in bands if band.low.size), default=0.0)
    high = max((float(np.max(band.high)) for band in bands if band.high.size), default=1.0)
    if metric.startswith("success"):
        low, high = 0.0, 1.0
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def _panels(figure: Figure, offline: bool, online: bool) -> tuple[Axes | None, Axes | None]:
    if offline and online:
        left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1.0, 2.3], "wspace": 0.05})
        return left, right
    only = figure.subplots()
    return (only, None) if offline else (None, only)


def _mark_warmup(axes: Axes, curves: Sequence[Curve]) -> None:
    ends = {item.warmup_steps for item in curves if item.warmup_steps}
    if not ends:
        return
    axes.axvspan(0, max(ends), color="#E69F00", alpha=0.12, linewidth=0, zorder=0)
    axes.annotate(
        "warm-up",
        (max(ends), 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, -3),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="#8a6100",
    )


def plot_curves(
    curves: Mapping[str, Curve],
    path: Path,
    metric: str = "return",
    title: str = "",
    statistic: str = "iqm",
    reference: tuple[str, float] | None = None,
) -> None:
    """Draw `label -> Curve` into the file `path`: pre-training left on grey, fine-tuning right, one vertical scale.

    `reference` is a labelled level, such as the mean of the dataset.
    """
    figure = Figure(figsize=(9.0, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    items = list(curves.values())
    left, right = _panels(
        figure,
        any(item.offline.steps.size for item in items),
        any(item.online.steps.size for item in items),
    )
    for index, (label, item) in enumerate(curves.items()):
        text = f"{label} (n={item.seeds})"
        if left is not None:
            _draw(left, item.offline, index, text)
        if right is not None:
            _draw(right, item.online, index, text)
    if left is not None:
        left.set_facecolor(SHADE)
        _dress(left, "Pre-training, offline", "gradient steps", [item.offline for item in items])
    if right is not None:
        _mark_warmup(right, items)
        _dress(right, "Fine-tuning, online", "environment steps", [item.online for item in items])
        if left is not None:
            right.axvline(0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
            right.tick_params(labelleft=False)
    first = left if left is not None else right
    assert first is not None
    first.set_ylim(*_limits(items, metric))
    first.set_ylabel(LABELS.get(metric, metric), color=INK)
    for axes in (left, right):
        if axes is not None and reference is not None:
            axes.axhline(reference[1], color="#777777", linewidth=1.0, linestyle=":", label=reference[0])
    _legend(figure, [axes for axes in (left, right) if axes is not None], last=reference[0] if reference else None)
    spread = "mean" if statistic == "mean" else "interquartile mean"
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left", fontweight="bold")
    note = f"{spread} over n seeds, 95 % bootstrap interval"
    figure.text(0.995, 0.985, note, ha="right", va="top", fontsize=7.5, color="#777777")
    save_picture(figure, path)


def check_picture(out: Path) -> None:
    """Raise `ConfigError` unless `out` has the suffix of a picture."""
    if out.suffix.lstrip(".").lower() not in FigureCanvasAgg.get_supported_filetypes():
        raise ConfigError(f"picture {out} has no known suffix; use one of .png, .pdf, .svg, .jpg")


def save_picture(figure: Figure, out: Path) -> None:
    """Write a figure into the file `out`, making its folder. Raises `ConfigError` if it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except OSError as error:
        raise ConfigError(f"picture {out} cannot be written: {error.strerror}") from error


def _legend(figure: Figure, panels: Sequence[Axes], last: str | None) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    if last in entries:
        entries[last] = entries.pop(last)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=min(len(entries), 4),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )


def _name(config: Mapping[str, Any], run: Path) -> str:
    """Return the name of the run's agent, or of its folder if the configuration has none."""
    return str(config.get("agent") if isinstance(config.get("agent"), str) else run.name)


def judged_by(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the metric that evaluation rows are judged by: `success` or `return`, or the `score` if that is neither.

    Offline estimates are judged by their action error. Rows without a score are judged by success where any knows it,
    else by the return.
    """
    if rows and all("action_error" in row for row in rows):
        return "action_error"
    if not rows or any(row.get("score") is None for row in rows):
        return "success" if any(row.get("success") is not None for row in rows) else "return"
    same = (metric for metric in ("success", "return") if all(row["score"] == row[metric] for row in rows))
    return next(same, "score")


def _replicates(runs: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> list[list[Path]]:
    """Group runs whose settings and data differ only in their seeds. A second run of a seed starts a new group."""
    groups: list[tuple[dict[str, Any], set[int], list[Path]]] = []
    for run, config in zip(runs, configs, strict=True):
        settings = {key: value for key, value in config.items() if key not in ("seed", "seeds", "versions")}
        seed = config.get("seed", 0)
        for known, seeds, group in groups:
            if known == settings and seed not in seeds:
                seeds.add(seed)
                group.append(run)
                break
        else:
            groups.append((settings, {seed}, [run]))
    return [group for _, _, group in groups]


def plot_runs(runs: Sequence[Path], out: Path, metric: str | None = None, statistic: str = "iqm") -> dict[str, Curve]:
    """Draw the learning curves of run folders in one picture and return the curves.

    Runs whose settings differ only in their seeds are one curve. Without `metric`, the plot shows what the runs are
    judged by (`judged_by`). Raises `RunError` for a folder without rows, or if no row has the metric. Raises
    `ConfigError` for an unknown `statistic`, or a picture that cannot be written.
    """
    check_picture(out)
    reduce = statistic_of(statistic)
    curves: dict[str, Curve] = {}
    configs = [read_json(run / "config.json") for run in runs]
    groups = _replicates(runs, configs)
    pooled = [pool(group) for group in groups]
    if metric is None:
        metric = judged_by([row for rows in pooled for row in rows])
    agents = {run: _name(config, run) for run, config in zip(runs, configs, strict=True)}
    names = [agents[group[0]] for group in groups]
    for name, group, rows in zip(names, groups, pooled, strict=True):
        result = curve(rows, metric, reduce)
        if result is not None:
            label = name if names.count(name) == 1 else f"{name}: {group[0].name}"
            label += f" and {len(group) - 1} more" if label != name and len(group) > 1 else ""
            while label in curves:
                label += "'"
            curves[label] = result
    if not curves:
        given = ", ".join(str(run) for run in runs)
        raise RunError(
            f"no evaluation with metric {metric!r} in {given}; run longer, or name one of {', '.join(LABELS)}"
        )
    plot_curves(curves, out, metric, statistic=statistic)
    return curves
