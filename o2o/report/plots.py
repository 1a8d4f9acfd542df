"""Plots of learning curves, one line with its interval per method, and the reading of the rows behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import EngFormatter, MaxNLocator

from o2o.errors import ConfigError, RunError
from o2o.files import read_object, read_rows
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


def _episodes(path: Path) -> list[dict[str, Any]]:
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        for key in ("seed", "env_steps", "gradient_steps"):
            if type(row.get(key)) is not int or abs(row[key]) > 2**53:
                raise RunError(f"{path}, line {number}: {key} is {row.get(key)!r}, expected an integer: restore it")
        for key in LABELS:
            if not isinstance(row.get(key), int | float | None):
                raise RunError(f"{path}, line {number}: {key} is {row[key]!r}, expected a number: restore it")
        if not isinstance(row.get("phase"), str):
            raise RunError(f"{path}, line {number}: phase is {row.get('phase')!r}, expected a word; restore the file")
    return rows


def pool(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the episode rows of several run folders with one `seed` number for each pair of run and seed.

    In the files, the seeds of every run count from 0. Raises `RunError`.
    """
    numbers: dict[tuple[int, int], int] = {}
    rows = [(run, row) for run, path in enumerate(runs) for row in _episodes(path / "episodes.jsonl")]
    for place in sorted({(run, row["seed"]) for run, row in rows}):
        numbers[place] = len(numbers)
    return [{**row, "seed": numbers[run, row["seed"]]} for run, row in rows]


def _draw(axes: Axes, band: Band, index: int, label: str, spread: bool, published: bool = False) -> None:
    if band.steps.size == 0:
        return
    color = COLORS[index % len(COLORS)]
    marker = MARKERS[index % len(MARKERS)]
    if spread:
        axes.fill_between(band.steps, band.low, band.high, color=color, alpha=0.07 if published else 0.16, linewidth=0)
    axes.plot(
        band.steps,
        band.centre,
        color=color,
        linewidth=1.2 if published else 1.9,
        linestyle=(0, (4, 2)) if published else "-",
        marker=marker,
        markersize=4.5,
        markevery=max(1, band.steps.size // 12),
        markeredgecolor="white",
        markeredgewidth=0.6,
        label=label,
    )


def _draw_published(panels: Sequence[Axes | None], theirs: Curve, index: int, label: str) -> None:
    text = f"{label}, published" + (f" (n={theirs.seeds})" if theirs.seeds else "")
    for axes, band in zip(panels, (theirs.offline, theirs.online), strict=True):
        if axes is not None:
            _draw(axes, band, index, text, True, published=True)


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


def _panels(figure: FigureBase, offline: bool, online: bool) -> tuple[Axes | None, Axes | None]:
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
    path: str | Path | None = None,
    metric: str = "return",
    title: str = "",
    statistic: str = "iqm",
    reference: tuple[str, float] | None = None,
    published: Mapping[str, Curve] | None = None,
) -> Figure:
    """Draw `label -> Curve`: pre-training left on grey, fine-tuning right, one vertical scale; return the figure.

    `path`: a file for the picture. `reference` is a labelled level, such as the mean of the dataset. `published` are
    other people's curves of some of the labels: dashed, in the same colours, with their spread.
    """
    figure = _figure(1)
    _draw_curves(figure, curves, metric, title, statistic, reference, published or {})
    if path is not None:
        save_picture(figure, Path(path))
    return figure


def _figure(rows: int) -> Figure:
    figure = Figure(figsize=(9.0, 4.4 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_curves(
    figure: FigureBase,
    curves: Mapping[str, Curve],
    metric: str,
    title: str,
    statistic: str,
    reference: tuple[str, float] | None = None,
    published: Mapping[str, Curve] = MappingProxyType({}),
) -> None:
    items = list(curves.values())
    left, right = _panels(
        figure,
        any(item.trains_first for item in items),
        any(item.online.steps.size for item in items),
    )
    for index, (label, item) in enumerate(curves.items()):
        text = f"{label} (n={item.seeds})"
        if left is not None:
            _draw(left, item.offline, index, text, item.seeds > 1)
        if right is not None:
            _draw(right, item.online, index, text, item.seeds > 1)
        if label in published:
            _draw_published((left, right), published[label], index, label)
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
    note = "one seed each, no interval"
    if any(item.seeds > 1 for item in items):
        where = "" if all(item.seeds > 1 for item in items) else " where n > 1"
        note = f"{spread} over n seeds, 95 % bootstrap interval{where}"
    figure.text(0.995, 0.985, note, ha="right", va="top", fontsize=7.5, color="#777777")


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


def _legend(figure: FigureBase, panels: Sequence[Axes], last: str | None) -> None:
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


@dataclass(frozen=True)
class Panel:
    """The curves of one task, all of one metric."""

    task: str
    metric: str
    curves: dict[str, Curve]


def panels(runs: Sequence[str | Path], metric: str | None = None, statistic: str = "iqm") -> list[Panel]:
    """Return the learning curves of run folders, one panel for each task.

    Runs whose settings differ only in their seeds are one curve. Without `metric`, a panel shows what its runs are
    judged by (`judged_by`). Raises `RunError` for a folder without rows, or if no row has the metric; `ConfigError` for
    an unknown `statistic`.
    """
    reduce = statistic_of(statistic)
    tasks: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for run in map(Path, runs):
        if not (run / "config.json").exists():
            raise RunError(f"{run} has no config.json; expected a run folder")
        config = read_object(run / "config.json")
        tasks.setdefault(_task(config), []).append((run, config))
    found = []
    for task, entries in tasks.items():
        folders, configs = [run for run, _ in entries], [config for _, config in entries]
        groups = _replicates(folders, configs)
        pooled = [pool(group) for group in groups]
        shown = metric or judged_by([row for rows in pooled for row in rows])
        curves: dict[str, Curve] = {}
        agents = {run: _name(config, run) for run, config in entries}
        names = [agents[group[0]] for group in groups]
        for name, group, rows in zip(names, groups, pooled, strict=True):
            result = curve(rows, shown, reduce)
            if result is None:
                continue
            label = name if names.count(name) == 1 else f"{name}: {group[0].name}"
            label += f" and {len(group) - 1} more" if label != name and len(group) > 1 else ""
            while label in curves:
                label += "'"
            curves[label] = result
        if curves:
            found.append(Panel(task, shown, curves))
    if not found:
        given = ", ".join(map(str, runs))
        wanted = "of any metric" if metric is None else f"with metric {metric!r}"
        raise RunError(f"no evaluation {wanted} in {given}; run longer, or name one of {', '.join(LABELS)}")
    return found


def _task(config: Mapping[str, Any]) -> str:
    """Return what a run learns from and where it acts: runs that differ in it are not comparable."""
    data = config.get("dataset")
    names = ", ".join(map(str, data)) if isinstance(data, list) else ""
    return f"{names} in {config['env']}" if config.get("env") else names


def plot_runs(
    runs: Sequence[str | Path] | str | Path,
    out: str | Path | None = None,
    metric: str | None = None,
    statistic: str = "iqm",
) -> Figure:
    """Draw the learning curves of run folders, a row for each task (see `panels`), and return the figure.

    `out`: a file for the picture. Raises `RunError` as `panels`, and `ConfigError` for an unknown `statistic` or a
    picture that cannot be written.
    """
    if out is not None:
        check_picture(Path(out))
    found = panels([runs] if isinstance(runs, str | Path) else runs, metric, statistic)
    figure = _figure(len(found))
    parts: Any = [figure] if len(found) == 1 else figure.subfigures(len(found), 1)
    for part, panel in zip(parts, found, strict=True):
        _draw_curves(part, panel.curves, panel.metric, panel.task if len(found) > 1 else "", statistic)
    if out is not None:
        save_picture(figure, Path(out))
    return figure
