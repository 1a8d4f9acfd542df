"""Tables and closing lines of the command line, printed with rich."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from o2o.data.files import DatasetInfo
from o2o.data.importers.plan import Plan, spoken
from o2o.data.importers.write import Imported
from o2o.errors import DatasetError, O2OError
from o2o.report.charts import number
from o2o.report.page import write_page
from o2o.report.plots import LABELS, Panel, judged_by, plot_runs, read_rows
from o2o.report.stats import Band
from o2o.report.sweep import Scored


def print_rows(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """Print mean and sample deviation over seeds of the per-seed means of evaluation rows.

    The task's own score, and the share of a human's steps, are printed only where they are not trivial.
    """
    table = Table(title=escape(title))
    for column in ("metric", "mean over seeds", "std over seeds", "episodes"):
        table.add_column(column)
    own = ("score",) if judged_by(rows) == "score" else ()
    human = ("intervention",) if any(row.get("intervention") for row in rows) else ()
    for key in (*own, "success", "success_last", "return", "normalized", "length", *human):
        known = [row for row in rows if row[key] is not None]
        if known:
            means = [np.mean([r[key] for r in known if r["seed"] == s]) for s in sorted({r["seed"] for r in known})]
            spread = f"{np.std(means, ddof=1):.3f}" if len(means) > 1 else "-"
            table.add_row(key, f"{np.mean(means):.3f}", f"{spread} (n={len(means)})", str(len(known)))
    console.print(table)


def near(path: Path) -> Path:
    """Return a path as one types it in the working folder, if it is inside."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def end(path: Path, finished: bool, console: Console) -> int:
    """Draw the curve of a finished run, write its page, print how to continue or watch it, and return exit code 0."""
    path = near(path)
    if not finished:
        _say(console, f"stopped; everything is saved. Continue with: o2o resume {path}")
        return 0
    played = True
    try:
        write_page(path)
        plot_runs([path], path / "curve.png")
        played = judged_by(read_rows(path / "episodes.jsonl")) != "action_error"
    except (O2OError, OSError, ValueError) as error:  # the run itself is complete
        _say(console, f"no curve drawn: {error}")
    watch = f" Watch it: o2o play {path} --out play.mp4" if played else ""
    _say(console, f"finished: {path} (report.html, curve.png, episodes.jsonl).{watch}")
    return 0


SAID_EVERY_S = 60.0


@contextlib.contextmanager
def making(name: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show how far a dataset is; yields `progress(done, total)`, to be called with counts of steps.

    Where no terminal is, a line a minute. The time left is by the steps since the first call, so it is not known before
    some are made, and what an earlier call made does not count.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, began, first, said = bar.add_task(escape(name), total=None, text=""), time.monotonic(), None, 0.0

        def progress(done: int, total: int) -> None:
            nonlocal first, began, said
            now = time.monotonic()
            if first is None:
                first, began, said = done, now, now
            text = f"{done:,} of {total:,} steps{_left(done - first, total - done, now - began)}"
            bar.update(task, completed=done, total=total, text=text)
            if not console.is_terminal and now - said >= SAID_EVERY_S:
                said = now
                _say(console, f"{name}: {text}")

        yield progress


def _left(made: int, missing: int, seconds: float) -> str:
    """Return in words at which rate steps were made, and how long those that are missing take at this rate."""
    if not made or not missing or seconds <= 0:
        return ""
    left = missing * seconds / made
    hours, minutes = divmod(round(left / 60), 60)
    words = f"about {hours} h {minutes:02d} min" if hours else f"about {minutes} min" if minutes else "under a minute"
    return f", {made / seconds:.0f} a second, {words} left"


def _say(console: Console, text: str) -> None:
    """Print a text whose brackets are no markup: paths have such."""
    console.print(text, highlight=False, markup=False)


def before_after(path: Path, console: Console) -> None:
    """Print the last offline evaluation beside the last online one, and commands to look further."""
    rows = read_rows(path / "episodes.jsonl")
    offline, online = [r for r in rows if r["phase"] == "offline"], [r for r in rows if r["phase"] == "online"]
    if not offline or not online:
        return
    last = max(r["env_steps"] for r in online)
    before = [r for r in offline if r["gradient_steps"] == max(o["gradient_steps"] for o in offline)]
    after = [r for r in online if r["env_steps"] == last]
    table = Table(title="what fine-tuning gained")
    for column in ("", "pre-trained", f"after {last} environment steps"):
        table.add_column(column)
    for key in ("success", "return", "length"):
        values = [sum(float(r[key]) for r in part) / len(part) for part in (before, after)]
        words = {"success": "{:.0%}", "return": "{:.2f}", "length": "{:.0f} steps"}[key]
        table.add_row(key, *(words.format(value) for value in values))
    table.add_row("episodes", str(len(before)), str(len(after)))
    console.print(table)
    _say(console, f"report: {path / 'report.html'}\nplay:  o2o play {path} --out play.mp4\neval:  o2o eval {path}")


def dataset_rows(found: Sequence[tuple[str, DatasetInfo | DatasetError]]) -> list[dict[str, Any]]:
    """Return one row per dataset; for one that cannot be read, the error."""
    return [
        {"dataset": name, "error": str(about)}
        if isinstance(about, DatasetError)
        else {"dataset": name, "environment": about.env_id, "episodes": about.episodes, "steps": about.steps}
        for name, about in found
    ]


def print_datasets(rows: Sequence[dict[str, Any]]) -> None:
    """Print one line per dataset, as wide as it needs: an id is there to be copied."""
    table = [("dataset", "environment", "episodes", "steps")]
    for row in rows:
        about = [f"broken: {row['error']}"] if "error" in row else [str(row[key]) for key in table[0][1:]]
        table.append((row["dataset"], *about))  # pyright: ignore[reportArgumentType]
    widths = [max(len(row[i]) for row in table if len(row) == 4) for i in range(4)]
    widths[0] = max(len(row[0]) for row in table)
    for row in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())


def print_json(value: Any) -> int:
    """Print a value as JSON, what is no JSON type as its text; return exit code 0."""
    print(json.dumps(value, indent=2, default=str))
    return 0


def print_plan(plan: Plan, licence: str | None, console: Console, words: Callable[[str], str] = str) -> None:
    """Print what an import makes of each column, and the rules by which it fills gaps, put into `words`."""
    table = Table()
    for column in ("column", "is", "becomes"):
        table.add_column(column, overflow="fold")
    for row in plan.table():
        table.add_row(*map(escape, row))
    console.print(table)
    for line in spoken(plan):
        console.print(f"- {escape(words(line))}", highlight=False)
    text = "not stated by the source; give it with `license`" if licence is None else licence.strip().splitlines()[0]
    console.print(f"- licence: {escape(words(text))}", highlight=False)


def print_imported(done: Imported, console: Console) -> None:
    """Print what an import made, and what it left out."""
    for episode, reason in done.dropped:
        console.print(f"left out episode {episode}: {escape(reason)}", highlight=False)
    left = f", {len(done.dropped)} left out" if done.dropped else ""
    console.print(
        f"imported {done.episodes} episodes, {done.steps} steps{left}: {escape(str(done.folder))}", highlight=False
    )


def print_episodes(rows: list[dict[str, Any]]) -> None:
    """Print one line per played episode."""
    for row in rows:
        print(f"episode {row['episode']}: return {row['return']:.2f}, {row['length']} steps, success {row['success']}")


def print_curves(panels: Sequence[Panel], console: Console) -> None:
    """Print the ends of both phases of every curve, with bootstrap intervals over seeds where there are several."""
    for panel in panels:
        table = Table(title=escape(f"{LABELS.get(panel.metric, panel.metric)}, {panel.task}"))
        for column in ("curve", "seeds", "pre-trained", "end of the online phase"):
            table.add_column(column, overflow="fold")
        for label, item in panel.curves.items():
            table.add_row(
                escape(label), str(item.seeds), *(_last(band, item.seeds) for band in (item.offline, item.online))
            )
        console.print(table)


def _last(band: Band, seeds: int) -> str:
    """Return the last value of a band in words, with its interval where there are several seeds."""
    if not band.steps.size:
        return "-"
    centre, low, high = (number(float(values[-1])) for values in (band.centre, band.low, band.high))
    return f"{centre} [{low}, {high}]" if seeds > 1 else centre


def print_scored(metric: str, lines: Sequence[Scored], console: Console) -> None:
    """Print the scores of a sweep, in the order given, with bootstrap intervals over seeds."""
    table = Table()
    for column in ("dataset", "settings", "seeds", metric):
        table.add_column(column, overflow="fold")
    for line in lines:
        low, high = line.interval
        spread = f" [{low:.3g}, {high:.3g}]" if len(line.scores) > 1 else ""
        table.add_row(escape(line.dataset), escape(line.label), str(len(line.scores)), f"{line.mean:.3g}{spread}")
    console.print(table)
