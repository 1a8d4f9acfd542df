"""Loggers: the screen, TensorBoard and W&B. The run folder itself always writes metrics.jsonl.

A resumed run writes the rows behind its checkpoint again. A logger that cannot take rows back gets every row once: the
file `sent.json` in the run folder says how far it came before the last resume.
"""

import json
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from o2o.errors import ConfigError, RunError, suggest
from o2o.files import read_object, read_rows, write_atomically

POSITION_KEYS = ("phase", "env_steps", "gradient_steps", "time_s", "seed", "episodes")
EVALUATED = ("success", "return", "normalized", "length", "action_error")
"""Quantities of an evaluation that go to the loggers."""
SENT = "sent.json"
"""File in a run folder: the last position of every kind of row that earlier processes sent to its loggers."""
WANDB_ID = "wandb.id"
"""File in a run folder with the id of its W&B run, so that a resumed run continues it."""


class Logger(Protocol):
    """Takes rows of metrics."""

    def metrics(self, row: dict[str, Any]) -> None:
        """Take one row: the keys of `POSITION_KEYS` and numbers."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


def evaluation_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per seed for the episodes of an evaluation: phase and steps, and means such as `eval/return`."""
    seeds: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], []).append(row)
    found = []
    for episodes in seeds.values():
        means = {key: [float(row[key]) for row in episodes if row.get(key) is not None] for key in EVALUATED}
        position = {key: episodes[0][key] for key in ("phase", "env_steps", "gradient_steps", "seed")}
        estimates = {key: value for key, value in episodes[0].items() if key.startswith("estimate/")}
        found.append({**position, **{f"eval/{key}": sum(v) / len(v) for key, v in means.items() if v}, **estimates})
    return found


class Sent:
    """The rows that loggers have from before a resume: per kind of row and seed, all up to a position."""

    def __init__(self, folder: Path) -> None:
        """Find out from a run's files before the rows behind its checkpoint are cut off, and note it in `sent.json`.

        Raises `RunError` if they cannot be read or written.
        """
        path, found = folder / SENT, [(row, _kind(row)) for row in _rows_of(folder / "metrics.jsonl")]
        found += [(row, "eval") for row in _rows_of(folder / "episodes.jsonl")]
        known = read_object(path) if path.exists() else {}
        self._until = {key: tuple(value) for key, value in known.items()}
        for row, kind in found:
            key = f"{kind}/{row.get('seed', 0)}"
            self._until[key] = max(self._until.get(key, (0, -1)), _position(row))
        if self._until and known != (now := {key: list(value) for key, value in self._until.items()}):
            try:
                write_atomically(path, json.dumps(now) + "\n")
            except OSError as error:
                raise RunError(f"cannot write {path}: {error.strerror}") from error

    def __contains__(self, row: dict[str, Any]) -> bool:
        """Whether loggers have this row, or another at its place."""
        return _position(row) <= self._until.get(f"{_kind(row)}/{row.get('seed', 0)}", (0, -1))


def _rows_of(path: Path) -> list[dict[str, Any]]:
    rows = read_rows(path) if path.exists() else []
    return [row for row in rows if {"phase", "env_steps", "gradient_steps"} <= row.keys()]


def _position(row: dict[str, Any]) -> tuple[int, int]:
    return (0, row["gradient_steps"]) if row["phase"] == "offline" else (1, row["env_steps"])


def _kind(row: dict[str, Any]) -> str:
    """Return which of a run's sequences of rows this one belongs to: `eval`, `episode` or `update`."""
    if any(key.startswith("eval/") for key in row):
        return "eval"
    return "episode" if "train/return" in row else "update"


class TensorBoard:
    """Write rows as TensorBoard scalars, one directory per seed (extra `log`)."""

    def __init__(self, folder: Path) -> None:
        """Write below `folder`. Raises `ConfigError` if tensorboardX is not installed."""
        try:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError("logger 'tensorboard' needs tensorboardX: pip install 'o2o[log]'") from error
        self._make, self._folder, self._writers = SummaryWriter, folder, {}

    def metrics(self, row: dict[str, Any]) -> None:
        """Write every number of the row at x = gradient steps offline, environment steps online."""
        seed = row.get("seed", 0)
        if seed not in self._writers:
            self._writers[seed] = self._make(str(self._folder / f"seed{seed}"))
        offline = row["phase"] == "offline"
        step, prefix = (row["gradient_steps"], "offline/") if offline else (row["env_steps"], "online/")
        for key, value in row.items():
            if key not in POSITION_KEYS and isinstance(value, int | float):
                self._writers[seed].add_scalar(prefix + key, value, step)
        self._writers[seed].flush()  # a killed run is not asked for these rows again

    def close(self) -> None:
        """Close the writers."""
        for writer in self._writers.values():
            writer.close()


class WandB:
    """Write rows as a Weights & Biases history (extra `log`).

    The x-axis is `env_steps`; for rows of pre-training, under `offline/`, it is `gradient_steps`. wandb's own variables
    WANDB_PROJECT (default: o2o), WANDB_ENTITY, WANDB_TAGS, WANDB_NAME and WANDB_DIR (default: the run folder) count.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """Start the W&B run of a run folder, or continue it. Raises `ConfigError` if wandb is missing or fails."""
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError("logger 'wandb' needs wandb: pip install 'o2o[log]'") from error
        path = folder / WANDB_ID
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex + "\n")
        run_id = path.read_text().strip()
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "o2o"),
                name=os.environ.get("WANDB_NAME", folder.name),
                dir=os.environ.get("WANDB_DIR", str(folder)),
                id=run_id,
                config=config,
                resume="allow",
            )
            self._run.define_metric("*", step_metric="env_steps")
            self._run.define_metric("offline/*", step_metric="gradient_steps")
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"logger 'wandb' cannot start ({reason}): log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def metrics(self, row: dict[str, Any]) -> None:
        """Log a row, with its seed in front of the keys: `seed0/critic/loss`, `offline/seed0/critic/loss`."""
        prefix = f"{'offline/' if row['phase'] == 'offline' else ''}seed{row.get('seed', 0)}/"
        values = {prefix + k: v for k, v in row.items() if k not in POSITION_KEYS}
        self._run.log({**values, "env_steps": row["env_steps"], "gradient_steps": row["gradient_steps"]})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def make_loggers(names: tuple[str, ...], folder: Path, config: dict[str, Any]) -> list[Logger]:
    """Return the loggers with these names. Raises `ConfigError` for an unknown or unavailable one."""
    makers = {"tensorboard": lambda: TensorBoard(folder / "tensorboard"), "wandb": lambda: WandB(folder, config)}
    unknown = [name for name in names if name not in makers]
    if unknown:
        hint = suggest(unknown[0], makers)
        raise ConfigError(f"no logger {unknown[0]!r}; {hint} (metrics.jsonl is always written)")
    return [makers[name]() for name in names]


def _draws_bars(console: Console) -> bool:
    """Whether bars can be drawn: rich draws them in a terminal and, with ipywidgets, in a notebook."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def notebook_screen(quiet: bool = False) -> "Screen | None":
    """Return a screen below the cell of a notebook; None in other processes, or if it is to be `quiet`."""
    console = Console()
    return Screen(console) if console.is_jupyter and not quiet else None


def sent_before(names: tuple[str, ...], folder: Path) -> "Sent | tuple[()]":
    """Return the rows that the loggers of a run have, nothing where there are none. Call it before `RunFolder.load`."""
    return Sent(folder) if names else ()


class Screen:
    """Show one progress bar per phase with the newest score. Without a terminal, print one line per evaluation."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on `console`; default: standard error."""
        self.console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=self.console, disable=not _draws_bars(self.console)
        )
        self._tasks: dict[str, TaskID] = {}
        self._note, self._depth = "", 0
        self._advised = False

    def __enter__(self) -> "Screen":
        """Start drawing; an inner `with` on the same screen changes nothing."""
        self._depth += 1
        if self._depth == 1:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self._depth -= 1
        if self._depth == 0:
            with suppress(OSError):
                self._progress.stop()

    def progress(self, phase: str, done: int, total: int, _: dict[str, float]) -> None:
        """Show `done` of `total` steps on the bar of `phase`."""
        name = "online" if phase in ("warmup", "online") else phase
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note="")
        label = "warm-up" if phase == "warmup" else name
        self._progress.update(self._tasks[name], completed=done, total=total, description=label, note=self._note)

    def advice(self, text: str) -> None:
        """Print the agent's advice, the first time only."""
        if not self._advised:
            with suppress(OSError):
                self.console.print(f"[yellow]advice[/yellow]: {escape(text)}", highlight=False)
        self._advised = True

    def episodes(self, rows: list[dict[str, Any]]) -> None:
        """Print one line for an evaluation. A terminal that has gone away does not end the run."""
        estimates = [row["action_error"] for row in rows if "action_error" in row]
        returns = [row["return"] for row in rows if row["return"] is not None]
        parts = [f"return {sum(returns) / len(returns):.2f}"] if returns else []
        parts += [f"held-out action error {sum(estimates) / len(estimates):.4f}"] if estimates else []
        known = [row["success"] for row in rows if row["success"] is not None]
        if known:
            parts.insert(0, f"success {100 * sum(known) / len(known):.0f} %")
        self._note = ", ".join(parts)
        at = f"{rows[0]['gradient_steps']} updates, {rows[0]['env_steps']} environment steps"
        played = "" if estimates else f" ({len(rows)} episodes)"
        line = f"[bold]{rows[0]['phase']}[/bold] after {at}: {self._note}{played}"
        with suppress(OSError):
            self.console.print(line, highlight=False)
