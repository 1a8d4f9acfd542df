"""Published figures beside a suite's own: where the data are the same, and whether ours lie within their spread."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from o2o.errors import RunError
from o2o.report.stats import Band, Curve, Point
from o2o.report.suite import Published

COLUMNS = ("dataset", "method", "published_as", "phase", "step", "success", "sd", "seeds", "low", "high", "source")
ERRORS = 2.0
"""Standard errors within which a mean of ours counts as the published one."""


@dataclass(frozen=True)
class Reference:
    """One published mean: success rates between 0 and 1."""

    dataset: str
    method: str
    """Label of our method."""
    published_as: str
    phase: str
    """`offline` or `online`."""
    step: int
    """Gradient steps offline, environment steps since the switch online."""
    mean: float
    sd: float | None
    """Sample standard deviation over the seeds; None where only an interval is published."""
    seeds: int | None
    low: float
    high: float
    """Mean and deviation, or the published interval."""
    source: str

    def distance(self, seeds: int) -> float | None:
        """Return two standard errors of the difference to a mean over `seeds` of ours; None without a deviation."""
        if self.sd is None or self.seeds is None:
            return None
        return ERRORS * self.sd * math.sqrt(1 / seeds + 1 / self.seeds)


def read_published(published: Published | None) -> list[Reference]:
    """Return the published figures of a suite; none without a file of them. Raises `RunError` for a broken file."""
    if published is None:
        return []
    path = published.file
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise RunError(f"{path}: columns {reader.fieldnames}, expected {list(COLUMNS)}; restore it from git")
            return [_parsed(row) for row in reader]
    except OSError as error:
        raise RunError(f"published figures {path} cannot be read ({error.strerror}); restore them from git") from error
    except (TypeError, ValueError) as error:
        raise RunError(f"{path}: a row has no number where one should be ({error}); restore it from git") from error


def _parsed(row: Mapping[str, str]) -> Reference:
    mean = float(row["success"]) / 100
    sd = float(row["sd"]) / 100 if row["sd"] else None
    low, high = (mean - sd, mean + sd) if sd is not None else (float(row["low"]) / 100, float(row["high"]) / 100)
    seeds = int(row["seeds"]) if row["seeds"] else None
    named = (row["dataset"], row["method"], row["published_as"], row["phase"], int(row["step"]))
    return Reference(*named, mean, sd, seeds, max(low, 0.0), min(high, 1.0), row["source"])


def published_curves(references: Sequence[Reference], dataset: str, ours: Mapping[str, Curve]) -> dict[str, Curve]:
    """Return the published curves on a dataset of the methods that `ours` has, as far as ours go in each phase."""
    found = {}
    for label, own in ours.items():
        rows = [r for r in references if (r.dataset, r.method) == (dataset, label)]
        bands = [_band([r for r in rows if r.phase == phase], band) for phase, band in _phases(own)]
        if any(band.steps.size for band in bands):
            found[label] = Curve(*bands, seeds=max((r.seeds or 0 for r in rows), default=0))
    return found


def _phases(own: Curve) -> list[tuple[str, Band]]:
    return [("offline", own.offline), ("online", own.online)]


def _band(rows: Sequence[Reference], own: Band) -> Band:
    last = own.steps.max() if own.steps.size else -1
    rows = sorted((r for r in rows if r.step <= last), key=lambda r: r.step)
    columns = [[getattr(r, name) for r in rows] for name in ("step", "mean", "low", "high")]
    return Band(*(np.asarray(column, np.float64) for column in columns))


def beside(references: Sequence[Reference], dataset: str, label: str, points: Sequence[Point]) -> list[str]:
    """Return the Markdown rows of a method's success rates at the steps for which a figure is published."""
    lines = []
    for r in references:
        if (r.dataset, r.method) != (dataset, label):
            continue
        for point in points:
            offline = point.phase == "offline"
            step = point.gradient_steps if offline else point.env_steps
            if step != r.step or offline != (r.phase == "offline"):
                continue
            n, mean, allowed = len(point.scores), float(point.values.mean()), r.distance(len(point.scores))
            theirs = f"{100 * r.mean:.0f} +- {100 * r.sd:.0f}" if r.sd is not None else f"{100 * r.mean:.0f}"
            theirs += f" ({r.seeds})" if r.seeds else f" [{100 * r.low:.0f}, {100 * r.high:.0f}]"
            within = "not known" if allowed is None else "yes" if abs(mean - r.mean) <= allowed else "**no**"
            spread = "-" if allowed is None else f"{100 * allowed:.0f}"
            cells = [f"`{dataset}`", label, f"{r.phase} {step:,}", f"{100 * mean:.0f} ({n})"]
            cells += [f"{r.published_as} {theirs}", f"{100 * (mean - r.mean):+.0f}", spread, within, r.source]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


HEAD = (
    "dataset", "method", "step", "ours (n)", "published (n)", "difference", "2 standard errors", "within?", "source",
)  # fmt: skip
TEXT = (
    "Success rates in %, at the steps for which both exist. The published spread is the sample standard deviation sd "
    "over seeds; brackets are a published 95 % interval. A mean over n seeds of ours counts as theirs within two "
    "standard errors, 2 sd sqrt(1/n + 1/their n). With few seeds that is a wide net. Our data are another draw of the "
    "same generator."
)
