"""Rows of the throughput benchmark: merged into what was measured before, written as Markdown and as pictures."""

import dataclasses
import json
import math
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from o2o.report.plots import COLORS, GRID, INK

SHAPE_NAMES = {
    "pen": "45 observations, 24 actions (AdroitHandPen-v1)",
    "cheetah": "17 observations, 6 actions (HalfCheetah-v5)",
    "pixels": "one camera of 64 x 64 x 3 beside 17 observations, 6 actions (HalfCheetah-v5, rendered)",
}
LIBRARIES = {"ours": "o2o", "sbx": "SBX", "sb3": "Stable-Baselines3", "d3rlpy": "d3rlpy"}
AS_RUN, PRODUCTS, SQUARES = "as run", "products alone", "large products"
"""Forms of the comparison: a library's own, and what bounds ours."""
PARTS = ("environment", "transfer", "update")


@dataclass(frozen=True)
class Row:
    """One form of one agent, shape and number of seeds on one device."""

    device: str
    agent: str
    shape: str
    seeds: int
    form: str
    """`offline` (`offline:STAGE`), `utdN`, or `online` for agents without a number of updates per step."""
    utd: int = 0
    """Critic updates per environment step; 0 where there is no such number."""
    updates: list[float] | None = None
    """Updates per second of all seeds together, each repeat."""
    single: list[float] | None = None
    """The same with one update in each call."""
    steps: list[float] | None = None
    """Environment steps per second of the whole online loop, all seeds together, each repeat."""
    compile_seconds: float = 0.0
    """What the first call took longer than the second."""
    peak_megabytes: float = 0.0
    flops: float | None = None
    """Matmul FLOPs of one update of one seed."""
    flops_xla: float | None = None
    """XLA's count for the program of one update call: one round of each loop, elementwise operations too."""
    matmul: Mapping[str, float] = field(default_factory=dict)
    """FLOP/s of the machine's own products, `small` and `large`, in the same process."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds of one online step's parts, each measured alone."""
    note: str = ""
    when: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a row anew replaces."""
        return (self.device, self.agent, self.shape, self.seeds, self.form)

    @property
    def step_milliseconds(self) -> float | None:
        """One step of the whole loop, of all seeds together."""
        return 1000.0 * self.seeds / statistics.median(self.steps) if self.steps else None

    @property
    def rest(self) -> float | None:
        """Milliseconds of a step that no part explains, each measured apart: Python; can be negative."""
        whole = self.step_milliseconds
        return None if whole is None or "update" not in self.parts else whole - sum(self.parts.values())

    @property
    def flops_per_second(self) -> float | None:
        """Matmul FLOP/s that the updates reach."""
        return self.flops * statistics.median(self.updates) if self.flops and self.updates else None

    @property
    def machine(self) -> str:
        """The machine's own rate of large products beside this row, in GFLOP/s."""
        return number(self.matmul["large"] / 1e9) if "large" in self.matmul else ""

    def share(self, which: str) -> float | None:
        """Return the part of the machine's own matmul rate, `small` or `large`, that the updates reach."""
        reached = self.flops_per_second
        return reached / self.matmul[which] if reached and self.matmul.get(which) else None


@dataclass(frozen=True)
class Contest:
    """One library's form in one case of the comparison; the rounds are those of all others in the case."""

    device: str
    case: str
    who: str
    """`ours`, or the library."""
    form: str
    version: str
    rates: list[float]
    """Per second, each round; empty where the library has no such algorithm."""
    note: str = ""
    when: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What is replaced together: rounds of different runs are no pairs."""
        return (self.device, self.case)


def today() -> str:
    """Return the date."""
    return time.strftime("%Y-%m-%d")


def merged(old: Iterable[Any], new: Sequence[Any]) -> list[Any]:
    """Return the old items whose key no new one has, and the new ones."""
    keys = {item.key for item in new}
    return [*(item for item in old if item.key not in keys), *new]


@dataclass
class Results:
    """Everything measured so far."""

    machines: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    contests: list[Contest] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Return the results of a folder, none where it has none; rows of another form are left out."""
        path = folder / "rows.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        if "machines" not in content:
            return cls()
        rows, contests = [Row(**row) for row in content["rows"]], [Contest(**row) for row in content["contests"]]
        return cls(content["machines"], rows, contests)

    def add(self, rows: Sequence[Row] = (), contests: Sequence[Contest] = ()) -> None:
        """Take new measurements in the place of old ones."""
        self.rows, self.contests = merged(self.rows, rows), merged(self.contests, contests)

    def save(self, folder: Path, cases: Mapping[str, Any], quick: bool = False) -> None:
        """Write `rows.json`, the tables and a picture per device; `cases` are the comparison's."""
        folder.mkdir(parents=True, exist_ok=True)
        content = dataclasses.asdict(self)
        (folder / "rows.json").write_text(json.dumps(content, indent=1) + "\n")
        for device, name in pictures(self.machines).items():
            chart(self, device, folder / name)
        text = markdown(self, cases)
        (folder / "README.md").write_text(
            f"A quick look at tiny sizes: no figure means anything.\n\n{text}" if quick else text
        )


def pictures(machines: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the file name of every device's picture: its platform, from the second device of one with its own name."""
    names: dict[str, str] = {}
    for device, about in machines.items():
        name = f"throughput-{about['platform']}"
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        names[device] = f"{name}-{slug}.png" if f"{name}.png" in names.values() else f"{name}.png"
    return names


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return median, least and largest of the rounds' ratios."""
    each = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return statistics.median(each), min(each), max(each)


def number(value: float | None, digits: int = 3) -> str:
    """Return a figure with so many digits that mean something, without exponent; empty for None."""
    if value is None:
        return ""
    if value == 0.0:
        return "0"
    places = max(0, digits - 1 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else digits
    return f"{value:,.{places}f}".replace(",", " ")


def spread(values: Sequence[float] | None) -> str:
    """Return the least and the largest."""
    return f"{number(min(values))} - {number(max(values))}" if values else ""


def middle(values: Sequence[float] | None) -> float | None:
    """Return the median, None of nothing."""
    return statistics.median(values) if values else None


def percent(share: float | None) -> str:
    """Return a share in percent."""
    return "" if share is None else f"{100 * share:.0f} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> list[str]:
    """Return the lines of a Markdown table, its first `left` columns flush left."""
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    return ["", *(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))]


def contest_lines(contests: Sequence[Contest], cases: Mapping[str, Any]) -> list[str]:
    """Return the tables of the comparison on one device."""
    lines = []
    for name in [name for name in cases if any(contest.case == name for contest in contests)]:
        case, own = cases[name], [contest for contest in contests if contest.case == name]
        forms = {c.form: c.rates for c in own if c.who == "ours"}
        ours, cells, notes = forms.get(AS_RUN, []), [], []
        for contest in own:
            label = contest.version or LIBRARIES[contest.who]
            if not contest.rates:
                notes.append(f"- {LIBRARIES[contest.who]}: {contest.note}.")
                continue
            ratio, low, high = ratios(ours, contest.rates)
            wanted = case.wanted.get(contest.who) if contest.form == AS_RUN else None
            for form in (PRODUCTS, SQUARES) if wanted and PRODUCTS in forms else ():
                bound = "{} ({} - {})".format(*map(number, ratios(forms[form], contest.rates)))
                name = f"{form[0].upper()}{form[1:]} / {LIBRARIES[contest.who]}"
                notes.append(f"- {name}: {bound}, {number(wanted)} wanted of the whole.")
            cells.append(
                (label, contest.form, number(middle(contest.rates)), spread(contest.rates), number(ratio),
                 f"{number(low)} - {number(high)}", number(wanted), contest.note)
            )  # fmt: skip
        head = ("library", "form", f"{case.unit}/s", "min - max", "o2o / it", "min - max", "wanted", "includes")
        lines += ["", f"### {case.title}", *table(head, cells, 2), *([""] if notes else []), *notes]
    return lines


UPDATES = ("agent", "form", "seeds", "updates/s", "min - max", "one per call", "compile s", "peak MB")
UPDATES = (*UPDATES, "MFLOP/update", "GFLOP/s", "of 256", "of 2048", "machine")
STEPS = ("agent", "form", "seeds", "steps/s", "min - max", "step ms", "environment", "transfer", "update", "rest")
STEPS = (*STEPS, "machine")


def update_cells(row: Row) -> tuple[str, ...]:
    """Return a row's cells under `UPDATES`."""
    mega = None if row.flops is None else row.flops / 1e6
    giga = None if row.flops_per_second is None else row.flops_per_second / 1e9
    return (
        row.agent, row.form, str(row.seeds), number(middle(row.updates)), spread(row.updates),
        number(middle(row.single)), f"{row.compile_seconds:.1f}", f"{row.peak_megabytes:.0f}", number(mega),
        number(giga), percent(row.share("small")), percent(row.share("large")), row.machine,
    )  # fmt: skip


def step_cells(row: Row) -> tuple[str, ...]:
    """Return a row's cells under `STEPS`."""
    parts = [number(row.parts.get(part)) for part in PARTS]
    start = (row.agent, row.form, str(row.seeds), number(middle(row.steps)), spread(row.steps))
    return (*start, number(row.step_milliseconds), *parts, number(row.rest), row.machine)


def order(row: Row) -> tuple[Any, ...]:
    """Return where a row stands: by agent, form, seeds."""
    form = int(row.form[3:]) if row.form.startswith("utd") else 0
    return (row.agent, not row.form.startswith("offline"), form, row.form if not form else "", row.seeds)


def row_lines(rows: Sequence[Row]) -> list[str]:
    """Return the tables of our agents on one device."""
    lines = []
    for shape, title in SHAPE_NAMES.items():
        own = sorted((row for row in rows if row.shape == shape), key=order)
        learning, played = [row for row in own if row.updates], [row for row in own if row.steps]
        if learning:
            cells = [update_cells(row) for row in learning]
            lines += ["", f"### {title}: updates", *table(UPDATES, cells, 2)]
        if played:
            lines += ["", f"### {title}: the whole online loop", *table(STEPS, [step_cells(r) for r in played], 2)]
        lines += [f"\n{note}." for note in sorted({row.note for row in own if row.note})]
    return lines


def markdown(results: Results, cases: Mapping[str, Any]) -> str:
    """Return the README of the results."""
    lines, names = ["# Throughput", "", *EXPLAINED.splitlines()], pictures(results.machines)
    for device, about in results.machines.items():
        rows = [row for row in results.rows if row.device == device]
        contests = [contest for contest in results.contests if contest.device == device]
        flags = f"; XLA_FLAGS `{about['xla_flags']}`" if about.get("xla_flags") else ""
        lines += [
            "",
            f"## {device}",
            "",
            f"jax {about['jax']} on {about['platform']}, Python {about['python']}{flags}.",
        ]
        products = [row.matmul for row in rows if row.matmul]
        if products:
            rates = [statistics.median(m[which] for m in products) / 1e9 for which in ("small", "large")]
            lines[-1] += f" Its own matmuls: {number(rates[0])} GFLOP/s at 256, {number(rates[1])} at 2048."
        lines += ["", f"![Ratios and updates per second]({names[device]})"]
        lines += contest_lines(contests, cases) + row_lines(rows)
    return "\n".join([*lines, ""])


EXPLAINED = """\
Made by `python benchmarks/throughput.py` (our agents) and `... --peers` (also other libraries); words select a part,
such as `iql cheetah 1seed` or `--peers comparison`, and what is measured anew replaces its rows. Raw repeats and dates:
`rows.json`.

Networks of each agent's `paper` preset, minibatches of 256 (staged agents: their own), synthetic transitions. Medians;
compilation is not in the rates. With several seeds in one program, rates are of all of them together.

- updates/s: critic updates (agents without critics, and offline those that only imitate there, EXPO and IBRL: policy
  updates). `offline`: 200 in one call, as the offline loop does; "one per call": waited for each time. `utdN`: the
  program of one online step, which stores a transition, draws, does N updates and chooses the next action. `online`:
  on-policy agents, whole loop; acting alone for those that do not learn online.
- compile s: what the first call took longer than the second. peak MB: of the process (GPU: of the device).
- MFLOP/update: matmuls and convolutions, counted in the traced program with all rounds of its scans, the mean
  over updates where some networks step in every second or fifth only. of 256, of 2048: GFLOP/s as a share of float32
  products of 256 x 256 x 256 and of 2048 x 2048 x 2048 in the same process.
- machine: GFLOP/s of those of 2048 x 2048 x 2048. Rows of different days are rates of a machine that is at times twice
  as fast as at others: compare rates only where this column is alike, else shares. It is measured before a
  cell's rows: a share above 100 % of 2048 says that the machine became faster meanwhile. One of 256 need not: larger
  products than those of 256 can be faster.
- The whole online loop: environment steps/s with the real environment, logging on, evaluation off. One step in ms, its
  parts each measured alone: stepping the environments (one after the other), moving what a step takes, the program.
  rest: what is left, Python, and the error of adding parts that were measured apart, the environments with one random
  action again and again, the program with one input; negative where that, or what the loop does at the same time, is
  more than Python's share. Where a step takes over two seconds its program is not measured alone: the columns are
  empty, and updates/s are those of the loop.

Comparison: observation 45, action 24, minibatches of 256, networks 256 x 256, full update of all networks; other
libraries in an environment of their own, default settings of their threads. All of a case take turns, round by round;
"o2o / it" is the median over rounds of the ratio to o2o's first form. "wanted": what the fastest published code, or a
published experiment, reached against that library elsewhere."""


def _panel(
    axes: Any, labels: Sequence[str], values: Sequence[float], colors: Sequence[str], title: str, log: bool = False
) -> None:
    """Draw values line by line: bars from 0, or on a scale without 0 points."""
    if log:
        axes.set_xscale("log")
        axes.scatter(values, range(len(values)), color=colors, s=22)
        axes.set_xlim(10 ** math.floor(math.log10(min(values)) - 0.1), 10 ** math.ceil(math.log10(max(values)) + 0.3))
    else:
        axes.barh(range(len(values)), values, color=colors, height=0.7)
        axes.margins(x=0.2)
    for i, value in enumerate(values):
        axes.annotate(number(value), (value, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def chart(results: Results, device: str, path: Path) -> None:
    """Draw a device's ratios to other libraries and its agents' offline updates per second into a file."""
    contests = [c for c in results.contests if c.device == device and c.rates]
    ours = {c.case: c.rates for c in contests if (c.who, c.form) == ("ours", AS_RUN)}
    others = [c for c in contests if c.who != "ours" and c.form == AS_RUN and c.case in ours]
    rows = [r for r in results.rows if r.device == device and r.seeds == 1 and r.updates]
    rows = sorted((r for r in rows if r.form.startswith("offline")), key=order)
    shapes = [shape for shape in SHAPE_NAMES if any(row.shape == shape for row in rows)]
    count = max(1, bool(others) + len(shapes))
    height = 1.2 + 0.2 * max([4, len(others), *(sum(r.shape == s for r in rows) for s in shapes)])
    figure = Figure(figsize=(4.0 * count, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = iter(figure.subplots(1, count, squeeze=False)[0])
    if others:
        values = [ratios(ours[c.case], c.rates)[0] for c in others]
        colors = [COLORS[list(LIBRARIES).index(c.who)] for c in others]
        labels = [f"{c.case} / {LIBRARIES[c.who]}" for c in others]
        axes = next(panels)
        _panel(axes, labels, values, colors, "o2o over others (ratio)")
        axes.axvline(1.0, color=INK, linewidth=1.0)
    for shape in shapes:
        own = [row for row in rows if row.shape == shape]
        values, axes = [middle(row.updates) or 0.0 for row in own], next(panels)
        labels = [" ".join((row.agent, row.form.partition(":")[2])).strip() for row in own]
        _panel(axes, labels, values, [COLORS[0]] * len(own), f"offline updates/s, {shape}", log=True)
    figure.suptitle(device, fontsize=9, color=INK, x=0.01, ha="left")
    figure.savefig(path)
