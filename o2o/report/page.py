"""`report.html` of a run: one page in one file, from the run folder's files alone.

It shows what differs from the preset, the evaluations with their curves, the training metrics, videos, the data, the
versions, and the command that makes such a run again.
"""

import base64
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import numpy as np

from o2o.config import ABOUT, PRESET, flat
from o2o.errors import RunError
from o2o.files import read_object, read_rows, write_atomically
from o2o.report.charts import Line, chart, legend, limits, number
from o2o.report.html import details, document, escape, table
from o2o.report.plots import LABELS, judged_by, pool
from o2o.report.stats import Band, Curve, Point, aggregate, curve, interval, mean

PAGE = "report.html"
VIDEOS = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif"}
EMBEDDED = 1_500_000
"""Largest video in bytes that the page holds in itself; it links to larger ones."""
PLACE = ("phase", "env_steps", "gradient_steps", "seed", "time_s")
"""Entries of a row of metrics.jsonl that are no metric."""


def write_page(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of the run in folder `run` to the file `out` (default: report.html there) and return its path.

    The run may still be going on. Raises `RunError` if the folder has no readable config.json or rows, or if the page
    cannot be written.
    """
    run = Path(run)
    if not (run / "config.json").exists():
        raise RunError(f"{run} has no config.json; expected a run folder")
    path = Path(out) if out is not None else run / PAGE
    try:
        text = run_page(run)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{run}: a file has other entries than a run writes ({error!r}); restore it from a copy"
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise RunError(f"page {path} cannot be written: {error.strerror}") from error
    return path


def run_page(run: Path) -> str:
    """Return the page of the run in folder `run`. Raises `RunError`."""
    config = read_object(run / "config.json")
    rows = pool([run]) if (run / "episodes.jsonl").exists() else []
    metrics = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    metrics = [row for row in metrics if _is_number(row.get("gradient_steps"))]
    name = run.resolve().name
    parts = [f"<h1>{escape(name)}</h1>", _subject(config), _tiles(run, config, rows, metrics)]
    parts += _evaluations(config, rows)
    parts += [_settings(run, config), _metrics(metrics), _videos(run), _data(run, config)]
    parts += ["<h2>Make it again</h2>", f"<pre>{escape(command(run, config))}</pre>"]
    parts += ["" if (run / PRESET).exists() else "<p>Add what differed from the preset.</p>"]
    parts += [_versions(config)]
    return document(f"{name} - {config.get('agent', 'o2o')}", "\n".join(part for part in parts if part))


def _subject(config: Mapping[str, Any]) -> str:
    dataset = config.get("dataset")
    names = " + ".join(map(str, dataset)) if isinstance(dataset, list) else str(dataset)
    where = f" in <code>{escape(config['env'])}</code>" if config.get("env") else ""
    return f"<p><b>{escape(config.get('agent'))}</b> on <code>{escape(names)}</code>{where}</p>"


def _tiles(run: Path, config: Mapping[str, Any], rows: Sequence[Any], metrics: Sequence[Any]) -> str:
    """Return the few numbers that a reader looks for first."""
    metric = judged_by(rows)
    points = aggregate(rows, metric)
    before = [point for point in points if point.phase == "offline"]
    after = [point for point in points if point.phase == "online"]
    status = read_object(run / "status.json").get("status") if (run / "status.json").exists() else "unknown"
    level = (config.get("dataset_summary") or {}).get(metric)
    label = LABELS.get(metric, metric)
    tiles = [("status", escape(status), f"seeds: {config.get('seeds', 1)}")]
    tiles += [(f"{label}, dataset", number(level), "mean over its episodes")] if level is not None else []
    tiles += [(f"{label}, pre-trained", *_value(before[-1], "gradient"))] if before else []
    tiles += [(f"{label}, fine-tuned", *_value(after[-1], "environment"))] if after else []
    times = [row["time_s"] for row in metrics if isinstance(row.get("time_s"), int | float)]
    tiles += [("training time", _duration(max(times)), "evaluations included")] if times else []
    shown = "".join(f"<div><dt>{escape(a)}</dt><dd>{b}<small>{escape(c)}</small></dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{shown}</dl>'


def _value(point: Point, unit: str) -> tuple[str, str]:
    steps = point.gradient_steps if unit == "gradient" else point.env_steps
    spread = ""
    if len(point.scores) > 1:
        low, high = interval(point.values)
        spread = f"[{number(low)}, {number(high)}], "
    return number(float(mean(point.values))), f"{spread}after {steps:,} {unit} steps"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# Evaluations


def curves(
    title: str,
    found: Mapping[str, Curve],
    metric: str,
    level: tuple[str, float] | None = None,
    order: Sequence[str] = (),
    published: Mapping[str, Curve] = MappingProxyType({}),
) -> str:
    """Return the charts of learning curves: pre-training on grey, fine-tuning beside it, one vertical scale.

    A lone evaluation at the end of pre-training has no chart of its own: fine-tuning begins with it. `order`: all
    labels of the page, so that each has one colour in all of its charts. `published` are other people's curves of some
    of the labels: dashed, in the same colours.
    """
    places = {label: number for number, label in enumerate(order or found)}
    shown = [(label, item, False) for label, item in found.items()]
    shown += [(label, item, True) for label, item in published.items()]
    names = [f"{label}, published" if theirs else label for label, _, theirs in shown]
    offline, online = (
        [
            Line(name, getattr(item, phase), places[label], theirs)
            for name, (label, item, theirs) in zip(names, shown, strict=True)
        ]
        for phase in ("offline", "online")
    )
    within = limits([*offline, *online], (0.0, 1.0) if metric.startswith("success") else None)
    warmup = max((item.warmup_steps for item in found.values()), default=0)
    parts = []
    for name, lines, unit, shaded, wanted in (
        ("pre-training, offline", offline, "gradient steps", True, any(item.trains_first for _, item, _ in shown)),
        ("fine-tuning, online", online, "environment steps", False, any(line.band.steps.size for line in online)),
    ):
        if wanted:
            marks = [(float(warmup), "warm-up ends")] if warmup and not shaded else []
            drawn = chart(f"{title}, {name}", lines, unit, within, shaded, marks, level)
            parts.append(f"<figure><figcaption>{escape(f'{title}: {name}')}</figcaption>{drawn}</figure>")
    named = [
        replace(line, label=f"{line.label} (n={item.seeds})" if item.seeds else line.label)
        for line, (_, item, _) in zip(online, shown, strict=True)
    ]
    key = legend(named) if len(named) > 1 else ""
    return f'{key}<div class="charts">{"".join(parts)}</div>'


def _evaluations(config: Mapping[str, Any], rows: Sequence[Any]) -> list[str]:
    """Return the curves of all metrics, the one that counts first, and the table of all evaluations."""
    if not rows:
        return ["<h2>Evaluations</h2>", "<p>None yet.</p>"]
    first = judged_by(rows)
    known = [metric for metric in LABELS if any(_tells(row, metric, first) for row in rows)]
    ordered = sorted(known, key=lambda metric: metric != first)
    means, drawn = config.get("dataset_summary") or {}, []
    for metric in ordered:
        found = curve(rows, metric, mean)
        if found is not None:
            level = means.get(metric)
            named = None if level is None else ("dataset mean", float(level))
            drawn.append(curves(LABELS[metric].capitalize(), {"": found}, metric, named))
    seeds = len({row["seed"] for row in rows})
    spread = "the line is the mean over seeds, the band its 95 % bootstrap interval" if seeds > 1 else "one seed"
    parts = [
        "<h2>Evaluations</h2>",
        f'<p class="soft"><span class="screen">Hover for values. </span>{spread.capitalize()}.</p>',
        *drawn[:1],
    ]
    parts += [details("other metrics", "\n".join(drawn[1:]))] if drawn[1:] else []
    return [*parts, details("table of evaluations", _table(rows, ordered), shown=True)]


def _tells(row: Mapping[str, Any], metric: str, first: str) -> bool:
    """Whether a row has a value that is not another's, or none of a human who never acted."""
    value = row.get(metric)
    return value is not None and (metric == first or metric != "score") and (metric != "intervention" or value > 0)


def _table(rows: Sequence[Any], metrics: Sequence[str]) -> str:
    """Return one line per evaluation."""
    found = {
        metric: {(p.phase, p.env_steps, p.gradient_steps): p for p in aggregate(rows, metric)} for metric in metrics
    }
    counts: dict[tuple[str, int, int], int] = {}
    for row in rows:
        place = (row["phase"], 0 if row["phase"] == "offline" else row["env_steps"], row["gradient_steps"])
        counts[place] = counts.get(place, 0) + 1
    places = list(dict.fromkeys(place for points in found.values() for place in points))
    lines = []
    for place in places:
        cells = [escape(place[0]), f"{place[1]:,}", f"{place[2]:,}", str(counts.get(place, ""))]
        lines.append([*cells, *(_scored(found[metric].get(place)) for metric in metrics)])
    head = ["phase", "environment steps", "gradient steps", "episodes", *(escape(LABELS[m]) for m in metrics)]
    return table(head, lines)


def _scored(point: Point | None) -> str:
    if point is None:
        return "-"
    value = number(float(mean(point.values)))
    if len(point.scores) < 2:
        return value
    low, high = interval(point.values)
    return f"{value} [{number(low)}, {number(high)}]"


# Training metrics


def _metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a small chart for every metric of training, over gradient steps; the band spans the seeds."""
    names = sorted({key for row in rows for key, value in row.items() if _is_number(value)} - set(PLACE))
    drawn = []
    switch = max((row["gradient_steps"] for row in rows if row.get("phase") == "offline"), default=0)
    for name in names:
        band = _over_seeds([row for row in rows if _is_number(row.get(name))], name)
        marks = [(float(switch), "online")] if 0 < switch < band.steps[-1] else []
        line = Line("", band)
        drawn.append(
            f"<figure><figcaption><code>{escape(name)}</code></figcaption>"
            f"{chart(name, [line], 'gradient steps', limits([line]), marks=marks)}</figure>"
        )
    if not drawn:
        return ""
    text = '<p class="soft">Means over seeds of metrics.jsonl; the band spans the seeds.</p>'
    charts = f'<div class="charts small">{"".join(drawn)}</div>'
    return f"<h2>Training</h2>\n{details(f'{len(drawn)} metrics', text + charts)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _over_seeds(rows: Sequence[Mapping[str, Any]], name: str) -> Band:
    """Return mean, lowest and highest value over seeds of a metric at each gradient step."""
    groups: dict[int, dict[int, float]] = {}
    for row in rows:
        groups.setdefault(row["gradient_steps"], {})[row.get("seed", 0)] = float(row[name])  # the last row counts
    steps = sorted(groups)
    values = [np.asarray([*groups[step].values()]) for step in steps]
    parts = [np.asarray([reduce(value) for value in values], np.float64) for reduce in (np.mean, np.min, np.max)]
    return Band(np.asarray(steps, np.float64), *parts)


# Settings and command

FREE = ("agent", "dataset", "preset", "env", "seed", "seeds")
"""What a preset does not choose."""


def changed(run: Path, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]] | None:
    """Return the settings of a config.json that are not the preset's: name to (the preset's, the run's).

    None if the folder does not say what the preset was. Raises `RunError` if that file is damaged.
    """
    if not (run / PRESET).exists():
        return None
    before, now = dict(flat(read_object(run / PRESET))), dict(flat(_settings_of(config)))
    names = [name for name in now if name not in FREE and before.get(name) != now[name]]
    return {name: (before.get(name), now[name]) for name in names}


def _settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ABOUT}


def _settings(run: Path, config: Mapping[str, Any]) -> str:
    """Return what differs from the preset, and all settings."""
    preset, found = escape(config.get("preset", "paper")), changed(run, config)
    parts = ["<h2>Settings</h2>"]
    if found:
        lines = [[f"<code>{escape(name)}</code>", _said(old), _said(new)] for name, (old, new) in found.items()]
        parts += [f"<p>What differs from the preset <code>{preset}</code>:</p>"]
        parts += [table(("setting", "preset", "this run"), lines)]
    elif found is None:
        parts += [f"<p>The folder has no {PRESET}, so what differs from the preset is not known.</p>"]
    else:
        parts += [f"<p>All settings are those of the preset <code>{preset}</code>.</p>"]
    every = [[f"<code>{escape(name)}</code>", _said(value)] for name, value in flat(_settings_of(config))]
    return "\n".join([*parts, details("all settings", table(("setting", "value"), every))])


def command(run: Path, config: Mapping[str, Any]) -> str:
    """Return the command line that begins a run with the settings of a run folder, under its name."""
    words = ["o2o", "train", str(config.get("agent")), "--dataset", *map(str, config.get("dataset") or [])]
    words += ["--preset", str(config.get("preset", "paper"))]
    settings = {name: config.get(name, start) for name, start in (("env", None), ("seed", 0), ("seeds", 1))}
    settings = {
        name: value for name, value in settings.items() if value not in (None, {"seed": 0, "seeds": 1}.get(name))
    }
    settings |= {name: now for name, (_, now) in (changed(run, config) or {}).items()}
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--name", run.resolve().name])


def _said(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"<code>{escape(text)}</code>" if text else "-"


# What the run had


def _videos(run: Path) -> str:
    """Return the videos of the run folder and of `videos/` in it: the small ones embedded, the others linked."""
    paths = sorted(path for place in (run, run / "videos") if place.is_dir() for path in place.iterdir())
    shown = []
    for path in paths:
        kind = VIDEOS.get(path.suffix.lower())
        if kind is None or not path.is_file():
            continue
        name = path.relative_to(run).as_posix()
        source = quote(name)
        if path.stat().st_size <= EMBEDDED:
            source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        player = f'<img src="{source}" alt="{escape(name)}">'
        if kind.startswith("video"):
            player = f'<video controls loop muted preload="metadata" src="{source}"></video>'
        shown.append(f"<figure>{player}<figcaption>{escape(name)}</figcaption></figure>")
    return f'<h2>Videos</h2><div class="charts">{"".join(shown)}</div>' if shown else ""


def _data(run: Path, config: Mapping[str, Any]) -> str:
    """Return what is known of the dataset."""
    lines: list[tuple[str, Any]] = []
    for key, value in (config.get("dataset_summary") or {}).items():
        lines += [(f"mean {LABELS.get(key, key)}", number(value))] if value is not None else []
    if (run / "dataset.json").exists():
        about = read_object(run / "dataset.json").get("dataset") or {}
        lines = [(key, f"{about[key]:,}") for key in ("episodes", "steps") if isinstance(about.get(key), int)] + lines
        for key, value in flat(about.get("task") or {}, "task."):
            lines += [(key, value)] if value not in (None, [], "", False) else []
        leaves = about.get("observation") or []
        lines += [
            ("observation", ", ".join(f"{'.'.join(map(str, path)) or 'vector'} {shape}" for path, shape, *_ in leaves))
        ]
    lines += [("fingerprint", config.get("fingerprint"))]
    found = [[escape(key), _said(value)] for key, value in lines if value]
    return f"<h2>Data</h2>\n{table((), found)}"


def _versions(config: Mapping[str, Any]) -> str:
    made = config.get("versions") if isinstance(config.get("versions"), dict) else {}
    return table((), [[escape(key), escape(value)] for key, value in (made or {}).items()])
