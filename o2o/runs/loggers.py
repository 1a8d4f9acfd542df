"""Loggers: the screen, TensorBoard and W&B. The run folder itself always writes metrics.jsonl."""

import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from o2o.errors import ConfigError, suggest
from o2o.files import write_atomically

POSITION_KEYS = ("phase", "env_steps", "gradient_steps", "time_s", "seed", "episodes")
EVALUATED = ("success", "return", "normalized", "length", "action_error")
"""Quantities of an evaluation that go to the loggers."""
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

    def close(self) -> None:
        """Close the writers."""
        for writer in self._writers.values():
            writer.close()


class WandB:
    """Write rows as a Weights & Biases history (extra `log`)."""

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
            self._run = wandb.init(project="o2o", id=run_id, name=folder.name, config=config, resume="allow")
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"logger 'wandb' cannot start ({reason}): log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def metrics(self, row: dict[str, Any]) -> None:
        """Log a row, with its seed in front of the keys: `seed0/critic/loss`."""
        prefix = f"seed{row.get('seed', 0)}/"
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
            *columns, TextColumn("{task.fields[note]}"), console=self.console, disable=not self.console.is_terminal
        )
        self._tasks: dict[str, TaskID] = {}
        self._note = ""

    def __enter__(self) -> "Screen":
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        with suppress(OSError):
            self._progress.stop()

    def progress(self, phase: str, done: int, total: int, _: dict[str, float]) -> None:
        """Show `done` of `total` steps on the bar of `phase`."""
        name = "online" if phase in ("warmup", "online") else phase
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note="")
        label = "warm-up" if phase == "warmup" else name
        self._progress.update(self._tasks[name], completed=done, total=total, description=label, note=self._note)

    def episodes(self, rows: list[dict[str, Any]]) -> None:
        """Print one line for an evaluation. A terminal that has gone away does not end the run."""
        estimates = [row["action_error"] for row in rows if "action_error" in row]
        returns = [row["return"] for row in rows if row["return"] is not None]
        parts = [f"return {sum(returns) / len(returns):.1f}"] if returns else []
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
