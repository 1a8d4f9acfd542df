"""The `o2o` command: the only module that parses arguments. What it does is in `o2o.runs.session`, `bench`, `plots`."""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text

from o2o.errors import ConfigError, DatasetError, O2OError
from o2o.startup import prepare_process
from o2o.usage import USAGE, lookup, one_line

Name = tyro.conf.Positional


def _train(args: list[str]) -> int:
    from o2o.agents import AGENTS

    listing = (
        f"usage: o2o train AGENT --dataset ID [options]\n\nagents: {', '.join(AGENTS)}\n"
        "`o2o train AGENT --help` explains every option."
    )
    if not args or args[0] in ("-h", "--help"):
        print(listing, file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    return _run_training(*parse_train(args[0], args[1:]))


def parse_train(agent: str, args: list[str]) -> tuple[Path, Any]:
    """Return the folder and the settings of a new run: those of `preset_run` with the same task, and `args` on top.

    They are read twice: first those that the preset depends on, then all. A field of the task given as None is the
    preset's, as in Python. Raises `ConfigError`; `--help` exits.
    """
    from o2o.runs import session
    from o2o.runs.presets import Chosen

    config_class, quiet = session.config_class(agent), [arg for arg in args if arg not in ("-h", "--help")]
    with one_line(prog := f"o2o train {agent}"):
        chosen, _ = tyro.cli(Chosen, args=quiet, prog=prog, return_unknown_args=True)
    if not chosen.dataset and quiet == args:
        raise ConfigError(f"{prog}: no --dataset; give a Minari id or a path (`o2o data list` shows the local ones)")
    default = chosen.run(agent)

    @dataclasses.dataclass(frozen=True)
    class TrainArgs(session.RunConfig):
        """Pre-train an agent on a dataset, then fine-tune it in the environment."""

        agent: Annotated[str, tyro.conf.Suppress]
        config: config_class  # pyright: ignore[reportInvalidTypeForm]
        preset: Literal["paper", "small"] = "paper"
        """Start from the paper's settings for the dataset's family of tasks, or from small ones for a laptop."""
        name: str | None = None
        """Name of the run; None for AGENT-DATASET-SEED."""
        runs: Path = Path("runs")
        """Folder that holds the runs."""

    with one_line(prog):
        parsed = tyro.cli(TrainArgs, args=args, default=TrainArgs(**vars(default)), prog=prog, console_outputs=True)
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(session.RunConfig)}
    config = session.RunConfig(**{**values, "task": default.task})
    slug = "+".join(Path(i).name if os.sep in i and Path(i).exists() else i.replace("/", "-") for i in config.dataset)
    return parsed.runs / (parsed.name or f"{agent}-{slug}-{config.seed}"), config


def _run_training(path: Path, config: Any) -> int:
    from o2o.report.tables import end
    from o2o.runs import session
    from o2o.runs.loggers import Screen

    console = Console(stderr=True)
    with Screen(console) as screen:
        finished = session.train(config, path, screen)
    return end(path, finished, console)


def resume(run: Name[Path], online_steps: int | None = None) -> int:
    """Continue a stopped or killed run from its last checkpoint, or a finished one for longer.

    Args:
        run: The run folder.
        online_steps: Environment steps in all, where they are to be other than the run began with.
    """
    from o2o.report.tables import end
    from o2o.runs import session
    from o2o.runs.loggers import Screen

    console = Console(stderr=True)
    with Screen(console) as screen:
        finished = session.resume(run, screen, online_steps)
    return end(run, finished, console)


def evaluate(
    run: Name[Path], episodes: int = 50, checkpoint: str = "latest", seed: int = 1, sample: bool = False
) -> int:
    """Evaluate a run's policy anew, all its seeds.

    Args:
        run: The run folder.
        episodes: Episodes per seed.
        checkpoint: `latest`, `best` or a checkpoint's number.
        seed: Seed of the evaluation environments.
        sample: Sample actions instead of taking the mode.
    """
    from o2o.report.tables import print_rows
    from o2o.runs import session

    rows = session.evaluate_run(run, episodes, checkpoint, seed, not sample)
    print_rows(rows, f"{run} ({checkpoint})", Console())
    return 0


def play(
    run: Name[Path],
    out: Path | None = None,
    episodes: int = 1,
    checkpoint: str = "latest",
    member: int = 0,
    seed: int = 1,
) -> int:
    """Watch a run's policy in a window, or write a video.

    Args:
        run: The run folder.
        out: Video file (.mp4, .gif, .webm); none opens a window.
        episodes: Episodes to play.
        checkpoint: `latest`, `best` or a checkpoint's number.
        member: Which of the run's seeds plays.
        seed: Seed of the environment.
    """
    from o2o.report.tables import print_episodes
    from o2o.runs import session

    print_episodes(session.play_run(run, out, episodes, checkpoint, member, seed))
    if out is not None:
        print(f"wrote {out}")
    return 0


def plot(
    runs: Name[tuple[Path, ...]],
    out: Path = Path("curves.png"),
    metric: Literal["auto", "score", "success", "return", "normalized"] = "auto",
    statistic: Literal["mean", "iqm"] = "mean",
) -> int:
    """Draw the learning curves of runs, with bootstrap bands over seeds.

    Args:
        runs: Run folders; those whose settings differ in their seeds only are pooled.
        out: The picture.
        metric: What is drawn; `auto` is what the tasks are judged by: success, return or a score of their own.
        statistic: Mean or interquartile mean over seeds.
    """
    from o2o.report.plots import plot_runs

    plot_runs(list(runs), out, None if metric == "auto" else metric, statistic=statistic)
    print(f"wrote {out}")
    return 0


def balance(run: Name[Path], out: Path = Path("balance.png")) -> int:
    """Draw the balance coefficient of a FamO2O run over the states of its dataset.

    Args:
        run: The run folder.
        out: The picture.
    """
    from o2o.runs.balance import plot_balance

    plot_balance(run, out)
    print(f"wrote {out}")
    return 0


def data_list(root: Path | None = None) -> int:
    """List the local datasets.

    Args:
        root: Folder of datasets; none means MINARI_DATASETS_PATH, else Minari's own.
    """
    from o2o.data import datasets
    from o2o.report.tables import print_datasets

    def about(name: str) -> Any:
        try:
            return datasets.info(name, root)
        except DatasetError as error:
            return error

    print_datasets([(name, about(name)) for name in datasets.list_datasets(root)], Console())
    return 0


def data_describe(dataset: Name[str], root: Path | None = None) -> int:
    """Describe one dataset: spaces, sizes, returns, success, task conventions.

    Args:
        dataset: Minari id or path.
        root: Folder of datasets.
    """
    from o2o import envs
    from o2o.data import datasets

    console = Console()
    described = {**datasets.describe(dataset, root), "task": envs.task_for(datasets.info(dataset, root))}
    for key, value in described.items():
        console.print(Text.assemble((key, "bold"), f": {value}"))  # a dataset's words are no markup
    return 0


def data_make(name: Name[str], root: Path | None = None) -> int:
    """Make one of the toolkit's own small datasets with its scripted controller.

    Args:
        name: Its id; an unknown one lists them.
        root: Folder to write to; none means MINARI_DATASETS_PATH, else Minari's own.
    """
    from o2o import envs

    print(f"made {envs.make_embedded(name, root)}")
    return 0


def data_check(dataset: Name[str], root: Path | None = None) -> int:
    """Check a dataset: readable, finite, within its spaces, replayable as its environment.

    Args:
        dataset: Minari id or path.
        root: Folder of datasets.
    """
    from o2o.data import datasets

    problems = datasets.check(dataset, root)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{dataset}: {'ok' if not problems else f'{len(problems)} problem(s)'}")
    return 2 if problems else 0


def data_export(run: Name[Path], id: str | None = None, root: Path | None = None) -> int:
    """Make a Minari dataset of the episodes that a run recorded (`o2o train ... --record`), finished or not.

    Args:
        run: The run folder.
        id: Id of the dataset; none means NAME-v0.
        root: Folder of datasets to write to; none means `recorded` in the run folder, where it replaces an older one.
    """
    from o2o.data import recorder

    print(f"wrote {recorder.export(run, id, root)}")
    return 0


def bench_run(
    suite: Name[str],
    agents: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    seeds: int | None = None,
    out: Path | None = None,
) -> int:
    """Run the missing cells of a suite; finished ones are never repeated, interrupted ones go on.

    Args:
        suite: Name of a file in benchmarks/.
        agents: Only these rows of the suite.
        tasks: Only these datasets.
        seeds: Number of seeds; none means the suite's own.
        out: Folder of results, its runs in `runs` there; none means benchmarks/results, with runs/bench.
    """
    from o2o.report import jobs as bench_jobs
    from o2o.runs import session
    from o2o.runs.loggers import Screen

    console = Console(stderr=True)
    with Screen(console) as screen:
        return bench_jobs.run_suite(
            suite,
            lambda cell, path: session.train(session.cell_run(cell, path), path, screen),
            lambda path: session.resume(path, screen),
            agents=agents,
            tasks=tasks,
            seeds=seeds,
            out=out,
            say=lambda text: console.print(text, highlight=False),
        )


def bench_report(suite: Name[str], out: Path | None = None) -> int:
    """Write the suite's Markdown table and curves from the raw rows.

    Args:
        suite: Name of a file in benchmarks/.
        out: Folder of results; none means benchmarks/results.
    """
    from o2o.report.suite_report import write_report

    print(f"wrote {write_report(suite, out)}")
    return 0


def demo(runs: Path = Path("runs"), offline_steps: int = 4_000, online_steps: int = 8_000, seed: int = 0) -> int:
    """Make a small dataset, pre-train, warm up, fine-tune, and show what the online phase gained.

    Args:
        runs: Folder that holds the runs.
        offline_steps: Gradient steps of pre-training; few, so that there is something to gain online.
        online_steps: Environment steps of the online phase.
        seed: Seed of the run.
    """
    from o2o import envs
    from o2o.report.tables import before_after
    from o2o.runs import session

    console = Console(stderr=True)
    dataset = envs.make_embedded(envs.DEMO_DATASET, None)
    console.print(f"dataset {dataset}: made with a scripted, imperfect controller", highlight=False)
    config = session.preset_run(
        "wsrl", dataset, "small", seed=seed, offline_steps=offline_steps, online_steps=online_steps
    )
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, eval_episodes=40))
    path, number = runs / "demo", 1
    while path.exists():
        number += 1
        path = runs / f"demo-{number}"
    code = _run_training(path, config)
    before_after(path, console)
    return code


def _group(name: str, commands: dict[str, Callable[..., int]], args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: o2o {name} {{{'|'.join(commands)}}} ...", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    return _call(lookup(args[0], commands, f"o2o {name}"), args[1:], f"o2o {name} {args[0]}")


def _call(function: Callable[..., int], args: list[str], prog: str) -> int:
    stderr = sys.stderr

    @functools.wraps(function)
    def command(*values: Any, **named: Any) -> int:
        with contextlib.redirect_stderr(stderr):  # only the parser's words are caught
            return function(*values, **named)

    with one_line(prog):
        return tyro.cli(command, args=args, prog=prog)


DATA = {"list": data_list, "describe": data_describe, "make": data_make, "check": data_check, "export": data_export}
BENCH = {"run": bench_run, "report": bench_report}
SIMPLE = {"resume": resume, "eval": evaluate, "play": play, "plot": plot, "balance": balance, "demo": demo}


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        from o2o import __version__

        print(f"o2o {__version__}")
        return 0
    command = lookup(args[0], {**SIMPLE, "train": 0, "data": 0, "bench": 0}, "o2o")
    if args[0] == "train":
        return _train(args[1:])
    if args[0] in ("data", "bench"):
        return _group(args[0], DATA if args[0] == "data" else BENCH, args[1:])
    return _call(command, args[1:], f"o2o {args[0]}")


class StandardError(logging.Handler):
    """Print log records as `o2o: message` to whatever `sys.stderr` is then: a progress bar puts its own there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; a terminal that has gone away does not end the run."""
        with contextlib.suppress(OSError):
            print(f"o2o: {self.format(record)}", file=sys.stderr)


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Print the messages of logger `o2o` (level INFO and up) to standard error."""
    logger, handler = logging.getLogger("o2o"), StandardError()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done (or stopped by a signal with all saved), 2 bad input, 1 anything else."""
    prepare_process()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every merge
    warnings.filterwarnings("ignore", module="orbax")
    with logging_to_stderr():
        try:
            code = _dispatch(list(sys.argv[1:] if args is None else args))
        except O2OError as error:
            print(f"o2o: error: {error}", file=sys.stderr)
            code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
