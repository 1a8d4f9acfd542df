"""Markdown, pictures and page (`report.html`) of a benchmark suite, from its kept results alone (`o2o.report.scores`).

There is one table per metric. It has each method's score after pre-training, at the end of the warm-up, after the first
1000 updates online and at the end, with the bootstrap interval over seeds and the dataset's own mean beside them; then
the same over the tasks. A last table says how often each method is better than the suite's first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from o2o.errors import RunError
from o2o.files import write_atomically
from o2o.report.charts import Line, chart, legend, limits
from o2o.report.html import document, markdown
from o2o.report.jobs import Job, folders, jobs
from o2o.report.page import PAGE, curves as learning_curves
from o2o.report.plots import LABELS, judged_by, plot_curves
from o2o.report.published import HEAD, TEXT, beside, published_curves, read_published
from o2o.report.scores import SCORES, FinishedCell, Row, read_cells, read_scores
from o2o.report.stats import (
    Floats,
    Point,
    aggregate,
    curve,
    interval,
    performance_profile,
    probability_of_improvement,
    statistic_of,
)
from o2o.report.suite import Cell, Suite, load_suite

FIRST_UPDATES, FEW = 1000, 20
"""Critic updates of the whole agent online before the column `early`, and how many of them may be missing there: the
evaluation planned for it does not wait for the first windows of several steps, which are complete some steps late."""
NO_POINT = "-"
EARLY = (
    f"'after the first {FIRST_UPDATES} updates': critic updates online, without those in one go before the first of "
    f"them\n(`initial_updates`); up to {FEW} fewer where windows of several steps delay them."
)
COLUMNS = {
    "offline": "offline",
    "warmup": "end of warm-up",
    "early": f"after the first {FIRST_UPDATES} updates",
    "end": "end",
}


@dataclass(frozen=True)
class Method:
    """The finished cells of one method on one dataset, joined."""

    dataset: str
    label: str
    rows: list[Row]
    """One per seed and evaluation."""
    cells: list[FinishedCell]

    @property
    def initial_updates(self) -> int:
        """Updates in one go before the first online one."""
        return self.cells[0].initial_updates


def read_methods(suite: Suite, folder: Path) -> list[Method]:
    """Return the suite's methods, in its order, that have results in `folder`.

    Cells that differ in their seeds only are joined. Raises `RunError` if a finished cell lacks a seed in `scores.csv`.
    """
    cells: dict[tuple[str, str], list[FinishedCell]] = {}
    for cell in read_cells(folder):
        cells.setdefault(cell.method, []).append(cell)
    rows: dict[tuple[str, str], list[Row]] = {}
    for row in read_scores(folder):
        rows.setdefault((row["dataset"], row["method"]), []).append(row)
    methods = []
    for method in dict.fromkeys((cell.dataset, cell.label) for cell in suite.cells()):
        found = cells.get(method, [])
        if not found:
            continue
        wanted = {seed for cell in found for seed in range(cell.seeds[0], cell.seeds[1] + 1)}
        own = [row for row in rows.get(method, []) if row["seed"] in wanted]
        missing = wanted - {row["seed"] for row in own}
        if missing:
            raise RunError(
                f"{folder / SCORES} lacks seed {min(missing)} of {method[1]} on {method[0]}, which is finished; "
                "restore the file from git, or remove the cell's line beside it and run it again"
            )
        methods.append(Method(*method, own, found))
    return methods


def stages(points: Sequence[Point], initial_updates: int = 0) -> dict[str, Point | None]:
    """Pick the table's evaluations: `offline`, `warmup`, `early` and `end`.

    `early` is the first past 1000 online updates, the `initial_updates` before the first of them not counted.
    """
    by_phase = {phase: [p for p in points if p.phase == phase] for phase in ("offline", "warmup", "online")}
    offline, warmup, online = by_phase["offline"], [p for p in by_phase["warmup"] if p.env_steps], by_phase["online"]
    before = max((p.gradient_steps for p in offline + warmup), default=0) + initial_updates
    early = [p for p in online if p.gradient_steps - before >= FIRST_UPDATES - FEW]
    return {
        "offline": offline[-1] if offline else None,
        "warmup": warmup[-1] if warmup else None,
        "early": early[0] if early else None,
        "end": online[-1] if online else None,
    }


def _number(value: float, metric: str) -> str:
    if metric.startswith("success"):
        return f"{100 * value:.0f} %"
    return f"{value:.2f}" if metric == "normalized" else f"{value:.0f}" if abs(value) >= 10 else f"{value:.3g}"


def _score(tasks: Sequence[Floats], metric: str, statistic: str) -> str:
    """Write the statistic over the seeds of all `tasks`, one row of scores each, with its interval."""
    if not tasks:
        return NO_POINT
    reduce = statistic_of(statistic)
    centre = _number(float(reduce(np.concatenate(tasks))), metric)
    if min(len(scores) for scores in tasks) == 1:
        return centre
    low, high = interval(tasks, reduce)
    return f"{centre} [{_number(low, metric)}, {_number(high, metric)}]"


def _dataset_mean(methods: Sequence[Method], metric: str) -> float | None:
    """Return the mean of the metric over the dataset that all `methods` learnt from; None if it is not known."""
    values = (cell.dataset_means.get(metric) for method in methods for cell in method.cells)
    return next((float(value) for value in values if value is not None), None)


def _table(suite: Suite, methods: Sequence[Method], planned: Sequence[Job], metric: str) -> list[str]:
    """Return the Markdown rows of one metric's table; empty if no row has the metric."""
    points = {(m.dataset, m.label): aggregate(m.rows, metric) for m in methods}
    if not any(points.values()):
        return []
    picked = {(m.dataset, m.label): stages(points[m.dataset, m.label], m.initial_updates) for m in methods}
    columns = COLUMNS if any(job.cell.online_steps for job in planned) else {"offline": COLUMNS["offline"]}
    head = ["dataset", "dataset's mean", "method", "n", *columns.values()]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for key in dict.fromkeys((job.cell.dataset, job.cell.label) for job in planned):
        own = [m for m in methods if (m.dataset, m.label) == key]
        level = _dataset_mean(own or [m for m in methods if m.dataset == key[0]], metric)
        row = [f"`{key[0]}`", NO_POINT if level is None else _number(level, metric), key[1]]
        if not points.get(key):
            row += ["0", "not run" if key not in points else NO_POINT, *[""] * (len(columns) - 1)]
        else:
            row += [str(max(len(p.scores) for p in points[key]))]
            row += [_score(_values([picked[key][stage]]), metric, suite.statistic) for stage in columns]
        lines.append(f"| {' | '.join(row)} |")
    return lines + _over_tasks(suite, points, picked, metric, list(columns))


def _values(points: Sequence[Point | None]) -> list[Floats]:
    """Return the scores of the points; none if one of them is missing."""
    found = [point.values for point in points if point is not None]
    return found if len(found) == len(points) else []


def _over_tasks(
    suite: Suite,
    points: dict[tuple[str, str], list[Point]],
    picked: dict[tuple[str, str], dict[str, Point | None]],
    metric: str,
    columns: Sequence[str],
) -> list[str]:
    """Return the rows of a metric's table over the tasks that all methods share; empty without a unit in common."""
    methods = [v.label for v in suite.variants if any(points.get((task.dataset, v.label)) for task in suite.tasks)]
    shared = [task.dataset for task in suite.tasks if all(points.get((task.dataset, label)) for label in methods)]
    if len(shared) < 2 or not (metric.startswith("success") or metric == "normalized"):
        return []
    lines = []
    for label in methods:
        found = [picked[dataset, label] for dataset in shared]
        seeds = sum(max(len(point.scores) for point in points[dataset, label]) for dataset in shared)
        row = [f"{len(shared)} tasks", NO_POINT, label, str(seeds)]
        row += [_score(_values([stage[name] for stage in found]), metric, suite.statistic) for name in columns]
        lines.append(f"| {' | '.join(row)} |")
    which = ", ".join(f"`{dataset}`" for dataset in shared)
    return [*lines, "", f"{len(shared)} tasks: {which}; their seeds together, resampled within each task."]


def _metrics(suite: Suite, methods: Sequence[Method]) -> tuple[str, ...]:
    """Return the suite's metrics, behind the score where some task is judged by one of its own."""
    own = any(judged_by(method.rows) == "score" for method in methods)
    return tuple(dict.fromkeys((*(("score",) if own else ()), *suite.metrics)))


def _metric_of(suite: Suite, methods: Sequence[Method]) -> str | None:
    """Return the first of the suite's metrics that the methods' rows have."""
    return next(
        (metric for metric in _metrics(suite, methods) if any(aggregate(m.rows, metric) for m in methods)), None
    )


def _improvement(suite: Suite, methods: Sequence[Method]) -> list[str]:
    """Return the table of every method's probability of improvement on the suite's first; empty if no two compare.

    By the scores at the last evaluations, where both have two seeds at least; then over the tasks.
    """
    first, lines = suite.variants[0].label, []
    pairs: dict[str, list[tuple[str, Floats, Floats]]] = {variant.label: [] for variant in suite.variants[1:]}
    for task in suite.tasks:
        here = [m for m in methods if m.dataset == task.dataset]
        metric = _metric_of(suite, here)
        points = {m.label: aggregate(m.rows, metric) for m in here} if metric is not None else {}
        ends = {label: found[-1].values for label, found in points.items() if found and len(found[-1].scores) > 1}
        for label in pairs:
            if metric is not None and first in ends and label in ends:
                pairs[label].append((metric, ends[label], ends[first]))
                lines.append(_better(f"`{task.dataset}`", label, pairs[label][-1:]))
    lines += [_better(f"{len(found)} tasks", label, found) for label, found in pairs.items() if len(found) > 1]
    if not lines:
        return []
    head = ["| dataset | metric | method | n | n of the first | probability |", f"|{' --- |' * 6}"]
    text = (
        f"How often a seed of the method beats one of `{first}`, the suite's first, at their last evaluations (ties "
        "count half), averaged over the tasks, with its 95 % bootstrap interval over the seeds of each task: the "
        'probability of improvement of Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice" (arXiv '
        "2108.13264). 0.5 is no difference. With three seeds on either side, 0 or 1 on one dataset has an interval of "
        "width zero and yet comes up once in ten where there is none."
    )
    return [f"## Probability of improvement on {first}", "", text, "", *head, *lines, ""]


def _better(where: str, label: str, pairs: Sequence[tuple[str, Floats, Floats]]) -> str:
    """Return one row of that table, of (metric, the method's scores, the first's) of one task or of several."""
    ours, firsts = [scores for _, scores, _ in pairs], [scores for _, _, scores in pairs]
    value, low, high = probability_of_improvement(ours, firsts)
    names = ", ".join(dict.fromkeys(LABELS.get(metric, metric) for metric, _, _ in pairs))
    counts = [str(sum(len(scores) for scores in side)) for side in (ours, firsts)]
    return f"| {where} | {names} | {label} | {' | '.join(counts)} | {value:.2f} [{low:.2f}, {high:.2f}] |"


def _machines(methods: Sequence[Method]) -> list[str]:
    names = dict.fromkeys(cell.versions.get("machine") for method in methods for cell in method.cells)
    return [str(name) for name in names if name] or ["not recorded"]


def _protocol(suite: Suite, machines: Sequence[str]) -> list[str]:
    steps = f"{suite.offline_steps:,} gradient steps offline"
    steps += f", {suite.online_steps:,} environment steps online" if suite.online_steps else ""
    own = [
        f"`{v.label}` {n:,} {unit}"
        for v in suite.variants
        for n, unit in ((v.offline_steps, "gradient steps offline"), (v.online_steps, "environment steps"))
        if n is not None
    ]
    other = f" Otherwise: {', '.join(own)}." if own else ""
    kind = "mean" if suite.statistic == "mean" else "interquartile mean"
    return [
        f"Preset `{suite.preset}`; {steps}; {suite.eval_episodes} evaluation episodes per seed.{other}",
        f"Figures are the {kind} over n seeds with their 95 % bootstrap interval in brackets; with three seeds",
        "that is the range of the seeds' scores, which covers the truth about three times in four.",
        *([EARLY] if suite.online_steps else []),
        f"'{NO_POINT}': no such evaluation. Machine: {'; '.join(machines)}.",
        "",
    ]


def reached(points: Sequence[Point], target: float) -> dict[int, int]:
    """Return, for every seed that reached `target`, the environment steps of its first evaluation there."""
    first: dict[int, int] = {}
    for point in sorted(points, key=lambda p: p.env_steps):
        for seed, score in point.scores.items():
            if score >= target:
                first.setdefault(seed, point.env_steps)
    return first


def _targets(suite: Suite, methods: Sequence[Method]) -> list[str]:
    """Return the table of environment steps to the tasks' targets; empty if none has one."""
    metric, goals = suite.metrics[0], {task.dataset: task.target for task in suite.tasks if task.target is not None}
    lines = [
        "| dataset | target | method | seeds that reached it | environment steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    found = [(m, aggregate(m.rows, metric)) for m in methods if m.dataset in goals]
    for method, points in found:
        target = goals[method.dataset]
        steps = sorted(reached(points, target).values())
        seeds = len({seed for point in points for seed in point.scores})
        cells = [f"`{method.dataset}`", _number(target, metric), method.label, f"{len(steps)} of {seeds}"]
        lines.append(f"| {' | '.join([*cells, ', '.join(f'{n:,}' for n in steps) or NO_POINT])} |")
    return ["## Environment steps to the target", "", *lines, ""] if found else []


def _unrun(planned: Sequence[Job]) -> list[str]:
    missing = [job for job in planned if job.state != "finished"]
    if not missing:
        return []
    lines = ["## Not run", "", *(f"- `{job.cell.name}` ({job.state})" for job in missing), ""]
    for job in missing:
        if job.failure.exists():
            trace = job.failure.read_text().rstrip().splitlines()
            lines += [f"`{job.cell.name}` failed:", "", *(f"    {line}" for line in trace), ""]
    return lines


def _pictures(suite: Suite, methods: Sequence[Method], folder: Path) -> tuple[list[str], dict[str, str]]:
    """Draw one picture per dataset with the first metric that it has.

    Return the Markdown links, and for the page the same curves: file to charts.
    """
    links, charts = [], {}
    for task in suite.tasks:
        here = [m for m in methods if m.dataset == task.dataset]
        metric = _metric_of(suite, here)
        if metric is None:
            continue
        found = {m.label: curve(m.rows, metric, statistic_of(suite.statistic)) for m in here}
        curves = {label: item for label, item in found.items() if item is not None}
        level = _dataset_mean(here, metric)
        reference = None if level is None else ("dataset mean", level)
        theirs = published_curves(read_published(suite.published), task.dataset, curves) if metric == "success" else {}
        name = f"{task.dataset.replace('/', '-')}.png"
        plot_curves(curves, folder / name, metric, task.dataset, suite.statistic, reference, theirs)
        links += [f"![{LABELS.get(metric, metric)} on {task.dataset}]({name})", ""]
        title = f"{LABELS.get(metric, metric).capitalize()} on {task.dataset}"
        charts[name] = learning_curves(title, curves, metric, reference, _order(suite), theirs)
    return links, charts


def _order(suite: Suite) -> list[str]:
    return [variant.label for variant in suite.variants]


def _profiles(suite: Suite, methods: Sequence[Method]) -> tuple[list[str], dict[str, str]]:
    """Return the performance profiles of the methods that ran on all tasks; nothing without a unit in common."""
    metric = next((m for m in suite.metrics if m.startswith("success") or m == "normalized"), None)
    if metric is None:
        return [], {}
    ends, tasks = dict[str, list[Floats]](), set[str]()
    for method in methods:
        if points := aggregate(method.rows, metric):
            ends.setdefault(method.label, []).append(points[-1].values)
            tasks.add(method.dataset)
    whole = {label: found for label, found in ends.items() if len(found) == len(tasks)}
    if len(whole) < 2:
        return [], {}
    values = np.concatenate([scores for found in whole.values() for scores in found])
    low, high = (0.0, 1.0) if metric.startswith("success") else (float(values.min()), float(values.max()))
    places = np.linspace(low, high, 41)
    order = _order(suite)
    lines = [Line(label, performance_profile(found, places), order.index(label)) for label, found in whole.items()]
    drawn = chart("performance profiles", lines, LABELS[metric], limits(lines, (0.0, 1.0)))
    title = f"Share of seeds above a {LABELS[metric]}"
    figure = f"<figure><figcaption>{title}</figcaption>{drawn}</figure>"
    text = (
        f"At the last evaluations, over {len(tasks)} task{'s' * (len(tasks) > 1)}: the share of seeds whose "
        f"{LABELS[metric]} is above the value on the axis, with its 95 % bootstrap interval. Higher is better."
    )
    return (
        ["## Performance profiles", "", text, "", "![profiles](profiles)", ""],
        {"profiles": f'{legend(lines)}<div class="charts">{figure}</div>'},
    )


def _published(suite: Suite, methods: Sequence[Method]) -> list[str]:
    """Return the table of our success rates beside published ones; empty if none is of a step of ours."""
    references, lines = read_published(suite.published), []
    for method in methods if references else ():
        lines += beside(references, method.dataset, method.label, aggregate(method.rows, "success"))
    if not lines:
        return []
    table = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}", *lines]
    return ["## Beside published figures", "", TEXT, "", *table, ""]


def _planned(suite: Suite, finished: Sequence[FinishedCell]) -> list[Cell]:
    """Return the suite's cells, with all `finished` seeds beyond the suite's own."""
    last = {cell.method: 0 for cell in finished}
    for cell in finished:
        last[cell.method] = max(last[cell.method], cell.seeds[1])
    methods = dict.fromkeys((cell.dataset, cell.label) for cell in suite.cells())
    counts = {method: max(suite.seeds, last.get(method, 0) + 1) for method in methods}
    return [cell for (dataset, label), n in counts.items() for cell in suite.cells([label], [dataset], n)]


def write_report(suite: Suite | str, out: Path | None = None, runs: Path | None = None) -> Path:
    """Write the suite's Markdown, pictures and page into its folder of results `out/<suite>/`; return the Markdown's.

    All seeds that were run are in it, also those beyond the suite's own; cells that were not run are listed. Raises
    `RunError` if the results are of other settings than the suite's.
    """
    suite = load_suite(suite) if isinstance(suite, str) else suite
    results_dir, runs_dir = folders(out, runs)
    folder = results_dir / suite.name
    methods = read_methods(suite, folder)
    planned = jobs(suite, _planned(suite, [cell for m in methods for cell in m.cells]), results_dir, runs_dir)
    lines = [f"# {suite.name}", "", suite.description, ""]
    if methods:
        lines += _protocol(suite, _machines(methods))
    for metric in _metrics(suite, methods):
        table = _table(suite, methods, planned, metric)
        if table:
            lines += [f"## {LABELS.get(metric, metric).capitalize()}", "", *table, ""]
    lines += _published(suite, methods) + _improvement(suite, methods)
    links, charts = _pictures(suite, methods, folder)
    rest = _targets(suite, methods) + _unrun(planned)
    rest += [f"Made by `o2o bench report {suite.name}` from `{SCORES}` in this folder.", ""]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    path.write_text("\n".join([*lines, *links, *rest]))
    profiles, drawn = _profiles(suite, methods)
    titled = ["## Learning curves", "", *links] if links else []
    again = ["## Make it again", "", f"`o2o bench run {suite.name}`, then `o2o bench report {suite.name}`.", ""]
    body = markdown([*lines, *profiles, *titled, *rest, *again], charts | drawn)
    write_atomically(folder / PAGE, document(suite.name, body))
    return path
