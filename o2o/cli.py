"""The `o2o` command: parses arguments with tyro and calls what other modules do.

Modules that need JAX are imported inside the commands, so that `o2o --help` starts fast.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text
from tyro.extras import SubcommandApp

from o2o.errors import ConfigError, DatasetError, O2OError, suggest
from o2o.startup import prepare_process
from o2o.usage import one_line

Name = tyro.conf.Positional
ABOUT = "Offline-to-online reinforcement learning: pre-train on recorded data, fine-tune in the environment."


def train(args: Name[tuple[str, ...]] = ()) -> int:
    """Pre-train an agent on a dataset, then fine-tune it in its environment: `o2o train AGENT --dataset ID`.

    Args:
        args: Name of the agent and the options of the run; `o2o train --help` lists the agents.
    """
    from o2o.agents import AGENTS

    if args and args[0] not in ("-h", "--help"):
        return _run_training(*parse_train(args[0], list(args[1:])))
    print(
        f"usage: o2o train AGENT --dataset ID [options]\n\nagents: {', '.join(AGENTS)}\n"
        "`o2o train AGENT --help` explains every option. A residual agent corrects a policy given by --base: a run "
        "folder, FILE.onnx, FILE.pt or module:function.",
        file=sys.stdout if args else sys.stderr,
    )
    return 0 if args else 2


def parse_train(agent: str, args: list[str]) -> tuple[Path, Any]:
    """Return the folder and the settings of a new run: those of `preset_run`, changed by `args`.

    The defaults depend on the agent and the dataset, so tyro reads `args` twice: first for the options that decide the
    preset, then for all, with the preset as default. An option of the task given as None keeps the preset's value.
    Raises `ConfigError` for bad input; `--help` exits.
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
        online_steps: Environment steps in total; default: as many as the run began with.
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
    """Evaluate the policies of all seeds of a run in fresh episodes.

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
    seed_index: int = 0,
    seed: int = 1,
) -> int:
    """Watch a run's policy in a window, or write a video.

    Args:
        run: The run folder.
        out: Video file (.mp4, .gif, .webm); default: a window.
        episodes: Episodes to play.
        checkpoint: `latest`, `best` or a checkpoint's number.
        seed_index: Which of the run's seeds plays.
        seed: Seed of the environment.
    """
    from o2o.report.tables import print_episodes
    from o2o.runs import session

    print_episodes(session.play_run(run, out, episodes, checkpoint, seed_index, seed))
    if out is not None:
        print(f"wrote {out}")
    return 0


def plot(
    runs: Name[tuple[Path, ...]],
    out: Path = Path("curves.png"),
    metric: Literal["auto", "score", "success", "return", "normalized", "action_error"] = "auto",
    statistic: Literal["mean", "iqm"] = "mean",
) -> int:
    """Draw the learning curves of runs, with bootstrap bands over seeds.

    Args:
        runs: Run folders. Runs whose settings differ only in their seeds are pooled into one curve.
        out: File of the picture.
        metric: What to draw. `auto` takes what the task is judged by: success, return or a score of its own.
        statistic: Mean or interquartile mean over seeds.
    """
    from o2o.report.plots import plot_runs

    if not runs:
        raise ConfigError("o2o plot: no run folder; give one or more, such as `o2o plot runs/demo`")
    plot_runs(list(runs), out, None if metric == "auto" else metric, statistic=statistic)
    print(f"wrote {out}")
    return 0


def balance(run: Name[Path], out: Path = Path("balance.png")) -> int:
    """Draw the balance coefficient of a FamO2O run over the states of its dataset.

    Args:
        run: The run folder.
        out: File of the picture.
    """
    from o2o.runs.balance import plot_balance

    plot_balance(run, out)
    print(f"wrote {out}")
    return 0


def data_list(root: Path | None = None) -> int:
    """List the local datasets.

    Args:
        root: Folder of datasets; default: MINARI_DATASETS_PATH, else Minari's own.
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
        name: Name of the dataset, such as pointmaze-umaze; an unknown name lists them.
        root: Folder to write to; default: MINARI_DATASETS_PATH, else Minari's own.
    """
    from o2o import envs

    print(f"made {envs.make_embedded(name, root)}")
    return 0


def data_import(
    path: Name[Path],
    id: Name[str | None] = None,
    format: Literal["auto", "lerobot", "robomimic", "d4rl", "ogbench", "arrays"] = "auto",
    keys: tuple[str, ...] = (),
    action: str | None = None,
    reward: str | None = None,
    success: str | None = None,
    env: str | None = None,
    episode_steps: int | None = None,
    license: str | None = None,
    drop_bad: bool = False,
    dry_run: bool = False,
    root: Path | None = None,
) -> int:
    """Import a dataset of LeRobot, robomimic, D4RL, OGBench, or of plain arrays in npz or HDF5 (docs/data_import.md).

    An import that was interrupted goes on when the same command is given again.

    Args:
        path: A file, or the folder of a LeRobot dataset.
        id: Id of the new dataset, such as lab/pick-v0.
        format: The format; auto: found out.
        keys: Observations: COLUMN, NAME=COLUMN, COLUMN@HxW or cam:NAME@HxW; default: all that the format calls so.
        action: Column of the actions.
        reward: Column of the rewards; `zero`; or `success`: 1 in steps that succeed.
        success: Column that is above 0 where a step succeeds; `last`: each episode's last step.
        env: Gymnasium id, or module:ID, of the environment that the data are for; it gives the spaces.
        episode_steps: Cut episodes after so many rows, where the file does not say where they end.
        license: Text of the licence, where the source does not state it.
        drop_bad: Leave faulty episodes out and count them; without it they are refused.
        dry_run: Show what would become what, and write nothing.
        root: Folder to write to; default: MINARI_DATASETS_PATH, else Minari's own.
    """
    from o2o.data.importers.plan import Environment, Options
    from o2o.data.importers.write import import_dataset, plan_import
    from o2o.report.tables import print_imported, print_plan

    place = None
    if env is not None:
        from o2o import envs

        place = Environment(*envs.spaces_of(env))
    options = Options(keys, action, reward, success, episode_steps, license, drop_bad)
    console = Console()
    if dry_run:
        print_plan(*plan_import(path, format, options, place), console)
        return 0
    if id is None:
        raise ConfigError("o2o data import: no id for the new dataset; give one, such as lab/pick-v0")
    with Console(stderr=True).status("importing") as status:
        done = import_dataset(
            path,
            id,
            format,
            options,
            place,
            root,
            progress=lambda at, total: status.update(f"imported {at} of {total} episodes"),
            planned=lambda plan, licence: print_plan(plan, licence, console),
        )
    print_imported(done, console)
    return 0


def data_check(dataset: Name[str], root: Path | None = None, drop_bad: bool = False, out: str | None = None) -> int:
    """Check that a dataset can be read, is finite, stays within its spaces and fits its environment.

    Args:
        dataset: Minari id or path.
        root: Folder of datasets.
        drop_bad: Write a new dataset without the faulty episodes; this one stays as it is.
        out: Id of the new dataset; default: the old one's with `-checked`.
    """
    from o2o.data import datasets

    if drop_bad:
        from o2o.data.clean import without_bad

        kept = without_bad(dataset, out, root)
        for problem in kept.problems:
            print(problem, file=sys.stderr)
        print(f"left out {kept.dropped} of {kept.dropped + kept.episodes} episodes; wrote {kept.folder}")
        return 0
    problems = datasets.check(dataset, root)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{dataset}: {'ok' if not problems else f'{len(problems)} problem(s)'}")
    return 2 if problems else 0


def data_export(
    run: Name[Path],
    id: str | None = None,
    root: Path | None = None,
    to: Literal["minari", "lerobot"] = "minari",
    out: Path | None = None,
    fps: float | None = None,
) -> int:
    """Make a Minari dataset of the episodes that a run recorded (`--record`), or a LeRobot dataset of a Minari one.

    Args:
        run: The run folder, which may still be going on; with `--to lerobot` the id or path of a dataset.
        id: Id of the dataset; default: NAME-v0.
        root: Folder of datasets, to write to; default: `recorded` in the run folder, replacing an earlier export.
        to: `minari`, or `lerobot`: LeRobot v3.0, parquet and video.
        out: New folder of the LeRobot dataset.
        fps: Its steps per second; default: those that the dataset was imported with.
    """
    if to == "lerobot":
        from o2o.data.lerobot_export import to_lerobot

        if out is None:
            raise ConfigError("o2o data export --to lerobot: give the new folder with --out")
        print(f"wrote {to_lerobot(str(run), out, fps, root)}")
        return 0
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
    """Run the cells of a suite that are missing and resume those that were interrupted.

    Args:
        suite: Name of a suite in benchmarks/suites.py, or a Python file that defines SUITE.
        agents: Only these rows of the suite.
        tasks: Only these datasets.
        seeds: Number of seeds; default: the suite's own.
        out: Folder of results, with the runs in OUT/runs; default: benchmarks/results, with the runs in runs/bench.
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
    """Write a suite's Markdown table and curves from its raw rows.

    Args:
        suite: Name of a suite in benchmarks/suites.py, or a Python file that defines SUITE.
        out: Folder of results; default: benchmarks/results.
    """
    from o2o.report.suite_report import write_report

    print(f"wrote {write_report(suite, out)}")
    return 0


def demo(runs: Path = Path("runs"), offline_steps: int = 4_000, online_steps: int = 8_000, seed: int = 0) -> int:
    """Make a small dataset, pre-train WSRL on it, fine-tune it, and show what the online phase gained.

    Args:
        runs: Folder that holds the runs.
        offline_steps: Gradient steps of pre-training; few, so that fine-tuning has something to gain.
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


Commands = Mapping[str, "Callable[..., int] | Commands"]
DATA: Commands = {
    "list": data_list,
    "describe": data_describe,
    "make": data_make,
    "import": data_import,
    "check": data_check,
    "export": data_export,
}
BENCH: Commands = {"run": bench_run, "report": bench_report}
COMMANDS: Commands = {
    "train": train,
    "resume": resume,
    "eval": evaluate,
    "play": play,
    "plot": plot,
    "balance": balance,
    "data": DATA,
    "bench": BENCH,
    "demo": demo,
}
GROUPS = {
    "data": "Local datasets: list, describe, make, import, check, export.",
    "bench": "Suites of benchmarks: run, report.",
}


def _bound(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """Return a function with the same signature that binds its arguments to `command` instead of calling it."""

    @functools.wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return bind


def _app(commands: Commands) -> SubcommandApp:
    """Return tyro's parser of commands. Parsing returns the chosen command with its arguments bound."""
    app = SubcommandApp()
    for name, command in commands.items():
        if callable(command):
            app.command(name=name)(_bound(command))
        else:
            app.command(_app(command), name=name, help=GROUPS[name])
    return app


def _prog(args: Sequence[str]) -> str:
    """Return the command that `args` name, such as `o2o data list`. Raises `ConfigError` for an unknown one.

    tyro would list all commands; this suggests the nearest.
    """
    known, prog = COMMANDS, "o2o"
    for word in args:
        if callable(known) or word.startswith("-"):
            break
        if word not in known:
            raise ConfigError(f"{prog} has no command {word!r}; {suggest(word, known)}")
        known, prog = known[word], f"{prog} {word}"
    return prog


def _dispatch(args: list[str]) -> int:
    if args == ["--version"]:
        from o2o import __version__

        print(f"o2o {__version__}")
        return 0
    if args[:1] == ["train"]:  # its options depend on the agent, so tyro reads them later
        return train(tuple(args[1:]))
    with one_line(_prog(args)):
        command = _app(COMMANDS).cli(prog="o2o", description=ABOUT, args=args)
    return command()


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
