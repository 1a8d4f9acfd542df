"""The `o2o` command: parses arguments with tyro and calls what other modules do.

Modules that need JAX are imported inside the commands, so that `o2o --help` starts fast.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from rich.console import Console
from rich.text import Text
from tyro.extras import SubcommandApp

from o2o import trust
from o2o.config import RunConfig, keyword_arguments
from o2o.errors import ConfigError, DatasetError, O2OError, suggest
from o2o.settings import AboveZero, Amount, Count, NotNegative, Seed, checked, read
from o2o.startup import prepare_process
from o2o.usage import WORDS, as_options, booleans, in_options, one_line, spelled_out

Name = tyro.conf.Positional
TRUST = "--trust"
ABOUT = (
    "Offline-to-online reinforcement learning: pre-train on recorded data, fine-tune in the environment. With --trust, "
    "any command runs the code that files of others name."
)
MAIN = {"dataset", "preset", "env", "base", "seed", "seeds", "offline_steps", "online_steps"}
"""The settings of a run that the help of `o2o train AGENT` shows first."""
WHOLE = (tyro.conf.FlagConversionOff,)
"""Booleans take a word; `spelled_out` adds the one of a bare --option."""
OPTIONS = {"name", "runs", *(field.name for field in dataclasses.fields(RunConfig))}
TRAIN_HELP = """
options that matter first:
  --dataset ID [ID ...]   Minari id or path; several are mixed
  --preset paper|small    the paper's settings, or small ones for a laptop
  --seeds 3               so many agents side by side
  --name NAME             name of the run folder
  --config.FIELD VALUE    a setting of the agent, such as --config.discount 0.98
Booleans: --record is --record True, --no-record is --record False. Whole numbers may be written 1e5.

examples:
  o2o train wsrl --dataset o2o/embedded/pointmaze-umaze-v0 --preset small --seeds 3
  o2o train residual --dataset ID --base runs/base     # or policy.onnx, policy.pt, module:function
  o2o train my_agents:Mine --dataset ID                # a class of your own in my_agents.py
  o2o train wsrl --dataset ID --help                   # every option, with its default for that dataset"""
EXAMPLES = {
    "o2o": """
examples:
  o2o demo                                                    # all of it in minutes
  o2o data make pointmaze-umaze                               # a small dataset
  o2o train wsrl --dataset o2o/embedded/pointmaze-umaze-v0 --preset small --name mine
  o2o eval runs/mine --episodes 100
  o2o play runs/mine --out play.mp4
  o2o help train                                              # the agents; `o2o COMMAND --help` for any command""",
    "o2o data": """
examples:
  o2o data list --json                # for scripts
  o2o data describe o2o/embedded/pointmaze-umaze-v0
  o2o data check path/to/dataset
  o2o data export runs/mine --id mine/recorded-v0""",
    "o2o bench": """
examples:
  o2o bench run benchmarks/my_suite.py --seeds 3
  o2o bench report benchmarks/my_suite.py""",
}


def train(args: Name[tuple[str, ...]] = ()) -> int:
    """Pre-train an agent on a dataset, then fine-tune it in its environment.

    Args:
        args: Name of the agent, or module:Class of your own, and the options of the run.
    """
    from o2o.agents import AGENTS

    agent, rest = _agent_of(list(args))
    if agent:
        return _run_training(*parse_train(agent, rest))
    print("usage: o2o train AGENT --dataset ID [options]\n\nagents:")
    print_lines({name: first_line(kind) for name, kind in AGENTS.items()} | {"module:Class": "an agent of your own"})
    print(TRAIN_HELP)
    if set(rest) <= {"-h", "--help"}:
        return 0 if rest else 2
    raise ConfigError("o2o train: no agent; name one first, such as `o2o train wsrl --dataset ID` (`o2o help train`)")


def _agent_of(args: list[str]) -> tuple[str, list[str]]:
    """Return the agent, given first or by --agent, "" if there is none, and the other arguments."""
    for index, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option == "--agent":
            end = index + (1 if equals else 2)
            return value or "".join(args[index + 1 : end]), args[:index] + args[end:]
    return (args[0], args[1:]) if args and not args[0].startswith("-") else ("", args)


def parse_train(agent: str, args: list[str]) -> tuple[Path, Any]:
    """Return the folder and the settings of a new run: those of `preset_run`, changed by `args`.

    The defaults depend on the agent and the dataset, so tyro reads `args` twice: first for the options that decide the
    preset, then for all, with the preset as default. An option of the task given as None keeps the preset's value.
    Raises `ConfigError` for bad input; `--help` exits.
    """
    from o2o.runs import session
    from o2o.runs.folder import NAME_BYTES, check_name
    from o2o.runs.presets import Chosen

    kinds = {**get_type_hints(session.RunConfig), "config": session.config_class(agent)}
    args = spelled_out(args, booleans(kinds))
    quiet = [arg for arg in args if arg not in ("-h", "--help")]
    parse = functools.partial(tyro.cli, prog=(prog := f"o2o train {agent}"), registry=WORDS, config=WHOLE)
    with one_line(prog):
        chosen, _ = parse(Chosen, args=quiet, return_unknown_args=True)
    if not chosen.dataset and quiet == args:
        raise ConfigError(f"{prog}: no --dataset; give a Minari id or a path (`o2o data list` shows the local ones)")
    default = chosen.run(agent)
    values = vars(default)
    first = {*MAIN, *(name for name in values if dataclasses.is_dataclass(values[name]))}

    @dataclasses.dataclass(frozen=True)
    class More(_part(session.RunConfig, kinds.keys() - first)):
        """What few runs set."""

    @dataclasses.dataclass(frozen=True)
    class Train(_part(session.RunConfig, first)):
        config: kinds["config"]  # pyright: ignore[reportInvalidTypeForm, reportGeneralTypeIssues]
        preset: Literal["paper", "small"] = "paper"
        """Start from the paper's settings for the dataset's family of tasks, or from small ones for a laptop."""
        name: str | None = None
        """Name of the run; None for AGENT-DATASET-SEED."""
        runs: Path = Path("runs")
        """Folder that holds the runs."""
        more: tyro.conf.OmitArgPrefixes[More] = More(**values)

    about = f"{first_line(session.agent_class(agent))}\n\nSuch as: {prog} --dataset ID --preset small --seeds 3"
    with one_line(prog):
        run = parse(Train, args=args, default=Train(**values), description=about, console_outputs=True)
    values = {name: getattr(run if name in first else run.more, name) for name in values}
    config = session.RunConfig(**{**values, "agent": default.agent, "task": default.task})
    slug = "+".join(Path(i).name if os.sep in i and Path(i).exists() else i.replace("/", "-") for i in config.dataset)
    before, after = f"{agent.rpartition(':')[2]}-", f"-{config.seed}"  # kept whole, so that seeds are told apart
    room = NAME_BYTES - len(os.fsencode(before + after))
    name = run.name if run.name is not None else before + os.fsencode(slug)[:room].decode(errors="ignore") + after
    check_name(name)
    return (run.runs / name).absolute(), config  # absolute: an environment may change the working folder


def _part(cls: type, shown: Iterable[str]) -> Any:
    """Return a class of the settings of `cls` whose help shows some of them only, and that checks nothing yet."""
    kinds, entries = get_type_hints(cls, include_extras=True), []
    for field in dataclasses.fields(cls):
        if field.name not in shown or field.name == "agent":
            default = dataclasses.field(default=field.default, default_factory=field.default_factory)  # pyright: ignore
            entries.append((field.name, Annotated[kinds[field.name], tyro.conf.Suppress], default))
    return dataclasses.make_dataclass(
        cls.__name__, entries, bases=(cls,), frozen=True, namespace={"__post_init__": lambda _: None}
    )


def _run_training(path: Path, config: Any, hub: Any = None) -> int:
    from o2o.report.tables import end
    from o2o.runs import session
    from o2o.runs.loggers import Screen

    console = Console(stderr=True)
    with Screen(console) as screen:
        finished = session.train(config, path, screen, hub=hub)
    return end(path, finished, console)


LISTEN = "127.0.0.1:7077"
LEARNER_HELP = f"""usage: o2o learner AGENT --dataset ID [options of o2o train] [--listen HOST:PORT]
       o2o learner RUN [--online-steps N] [--listen HOST:PORT]

Train as `o2o train` does, but for the transitions of the online phase: robots send them (`o2o actor`). The environment
of the run, the dataset's or --env, only evaluates. With a run folder a stopped or killed learner goes on.

  --listen HOST:PORT      where robots find the learner (default: {LISTEN}, this machine only)

Beyond one machine set O2O_LEARNER_KEY to the same long random word on all of them."""


def learner(args: Name[tuple[str, ...]] = (), listen: str = LISTEN) -> int:
    """Train a run whose transitions robots send (`o2o actor`), or go on with one.

    Args:
        args: An agent and the options of `o2o train`; or the run folder of a learner, to go on.
        listen: HOST:PORT where robots find it.
    """
    from o2o.train.link import Hub, address_of, shared_key

    agent, rest = _agent_of(list(args))
    if not agent:
        print(LEARNER_HELP)
        if set(rest) <= {"-h", "--help"}:
            return 0 if rest else 2
        raise ConfigError("o2o learner: no agent; name one first, such as `o2o learner wsrl --dataset ID`")
    address = address_of(listen)
    if os.sep in agent or os.path.exists(os.path.join(agent, "config.json")):
        with one_line(f"o2o learner {agent}"):
            more = tyro.cli(_more_steps, prog=f"o2o learner {agent}", args=spelled_out(rest, {}), registry=WORDS)
        begin = functools.partial(_resumed, Path(agent), more)
    else:
        begin = functools.partial(_run_training, *parse_train(agent, rest))
    hub = Hub(address, shared_key(address[0]))
    try:
        return begin(hub=hub)
    finally:
        hub.close()


def _more_steps(online_steps: Amount | None = None) -> int | None:
    """Go on with a learner's run.

    Args:
        online_steps: Environment steps in total; default: as many as the run began with.
    """
    return online_steps


def listening(args: Sequence[str]) -> tuple[list[str], str]:
    """Return the arguments of `o2o learner` without --listen, and its value."""
    for index, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option == "--listen":
            end = index + (1 if equals else 2)
            return [*args[:index], *args[end:]], value or "".join(args[index + 1 : end])
    return list(args), LISTEN


def actor(
    env: str,
    learner: str = LISTEN,
    spool: Path = Path("spool"),
    lost: Literal["finish", "stop", "go-on"] = "finish",
    episodes: Count | None = None,
    env_kwargs: tuple[str, ...] = (),
    episode_limit: Count | None = None,
    base: str | None = None,
) -> int:
    """Act in an environment here, such as a robot, for a learner elsewhere (`o2o learner`).

    Args:
        env: Gymnasium id of the environment, or module:ID.
        learner: HOST:PORT of the learner.
        spool: Folder of transitions that the learner has not saved yet; the same one again sends them.
        lost: While no learner answers: `finish` the episode and wait, `stop` at once and wait, or `go-on`.
        episodes: Episodes to play; default: until the learner has finished.
        env_kwargs: Arguments of the environment, NAME=VALUE each.
        episode_limit: Steps after which an episode is cut; default: the learner's setting.
        base: A copy of the base policy that the learner's agent corrects: what its own --base takes.
    """
    from o2o.runs.actor import act

    with Console(stderr=True).status("acting") as status:
        done = act(
            env, learner, spool.absolute(), lost, episodes, env_kwargs, episode_limit, base,
            lambda episode, row: status.update(f"episode {episode}: return {row['return']:.4g}"),
        )  # fmt: skip
    print(f"played {done.episodes} episodes, {done.transitions} transitions; {done.waiting} wait in {spool}")
    return 0


def resume(run: Name[Path], online_steps: Amount | None = None) -> int:
    """Continue a stopped or killed run from its last checkpoint, or a finished one for longer.

    Args:
        run: The run folder.
        online_steps: Environment steps in total; default: as many as the run began with.
    """
    return _resumed(run, online_steps)


def _resumed(run: Path, online_steps: int | None, hub: Any = None) -> int:
    from o2o.report.tables import end
    from o2o.runs import session
    from o2o.runs.loggers import Screen

    console = Console(stderr=True)
    run = run.absolute()  # an environment may change the working folder
    with Screen(console) as screen:
        finished = session.resume(run, screen, online_steps, hub=hub)
    return end(run, finished, console)


def evaluate(
    run: Name[Path],
    episodes: Count = 50,
    checkpoint: str = "latest",
    seed: Seed = 1,
    sample: bool = False,
    guidance: float | None = None,
    json: bool = False,
) -> int:
    """Evaluate the policies of all seeds of a run in fresh episodes.

    Args:
        run: The run folder.
        episodes: Episodes per seed.
        checkpoint: `latest`, `best` or a checkpoint's number.
        seed: Seed of the evaluation environments.
        sample: Sample actions instead of taking the mode.
        guidance: Weight of Q's gradient in the flow's steps, in place of the run's (agents with `config.guidance`).
        json: Print the rows, one per episode, as JSON.
    """
    from o2o.report.tables import print_json, print_rows
    from o2o.runs import session

    rows = session.evaluate_run(run, episodes, checkpoint, seed, not sample, guidance)
    if json:
        return print_json(rows)
    print_rows(rows, f"{run} ({checkpoint})", Console())
    return 0


def play(
    run: Name[Path],
    out: Path | None = None,
    episodes: Count = 1,
    checkpoint: str = "latest",
    seed_index: Amount = 0,
    seed: Seed = 1,
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


def diagnose(
    run: Name[Path],
    episodes: Count = 20,
    checkpoint: str = "latest",
    seed_index: Amount = 0,
    seed: Seed = 1,
    json: bool = False,
) -> int:
    """Look at a pre-trained run before it goes online: its policy, its Q, what to expect and what to do.

    Writes a page with a picture to RUN/diagnosis.

    Args:
        run: The run folder.
        episodes: Episodes of each form of the policy: as it is, sampled, and moved a little.
        checkpoint: `latest`, `best` or a checkpoint's number.
        seed_index: Which of the run's seeds.
        seed: Seed of the evaluation environments.
        json: Print all numbers as JSON instead of the page.
    """
    from o2o.report.diagnosis import PAGE, page
    from o2o.report.tables import print_json
    from o2o.runs.diagnosis import diagnose as look

    found = look(run, episodes, checkpoint, seed_index, seed)
    if json:
        return print_json(found)
    print(f"{page(found)}\nwrote {run / 'diagnosis' / PAGE}")
    return 0


def export(
    run: Name[Path],
    out: Name[Path],
    checkpoint: str = "latest",
    seed_index: int = 0,
    sample: bool = False,
    guidance: float | None = None,
) -> int:
    """Write a run's policy to a file that acts without o2o, and its contract beside it (OUT.json).

    Args:
        run: The run folder.
        out: File of the policy: .onnx (needs o2o[onnx]) or .jax (for JAX, on CPU and CUDA).
        checkpoint: `latest`, `best` or a checkpoint's number.
        seed_index: Which of the run's seeds.
        sample: Sample actions instead of taking the mode.
        guidance: Weight of Q's gradient in the flow's steps, in place of the run's (agents with `config.guidance`).
    """
    from o2o.runs import session

    for name, taken in session.export_run(run, out, checkpoint, seed_index, sample, guidance).items():
        print(f"{name}: an action takes {taken.p50:.3f} ms (p50), {taken.p99:.3f} ms (p99)")
    print(f"wrote {out} and {out}.json")
    return 0


def plot(
    runs: Name[tuple[Path, ...]],
    out: Path = Path("curves.png"),
    metric: Literal["auto", "score", "success", "return", "normalized", "action_error"] = "auto",
    statistic: Literal["mean", "iqm"] = "mean",
) -> int:
    """Draw the learning curves of runs, with bootstrap bands over seeds, and print their ends.

    Args:
        runs: Run folders. Runs whose settings differ only in their seeds are pooled into one curve.
        out: File of the picture.
        metric: What to draw. `auto` takes what the task is judged by: success, return or a score of its own.
        statistic: Mean or interquartile mean over seeds.
    """
    from o2o.report.plots import panels, plot_runs
    from o2o.report.tables import print_curves

    if not runs:
        raise ConfigError("o2o plot: no run folder; give one or more, such as `o2o plot runs/demo`")
    shown = None if metric == "auto" else metric
    plot_runs(list(runs), out, shown, statistic=statistic)
    print_curves(panels(list(runs), shown, statistic), Console())
    print(f"wrote {out}")
    return 0


def report(run: Name[Path], out: Path | None = None) -> int:
    """Write a run's page, in one file: curves, evaluations, settings that differ from the preset, data, versions.

    Several runs in one picture: `o2o plot`.

    Args:
        run: The run folder, which may still be going on.
        out: File of the page; default: report.html in the run folder.
    """
    from o2o.report.page import write_page

    print(f"wrote {write_page(run, out)}")
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


def data_list(root: Path | None = None, json: bool = False) -> int:
    """List the local datasets.

    Args:
        root: Folder of datasets; default: MINARI_DATASETS_PATH, else Minari's own.
        json: Print a list of objects as JSON.
    """
    from o2o.data import datasets
    from o2o.report.tables import dataset_rows, print_datasets, print_json

    def about(name: str) -> Any:
        try:
            return datasets.info(name, root)
        except DatasetError as error:
            return error

    found = dataset_rows([(name, about(name)) for name in datasets.list_datasets(root)])
    if json:
        return print_json(found)
    print_datasets(found)
    return 0


def data_describe(dataset: Name[str], root: Path | None = None, json: bool = False) -> int:
    """Describe one dataset: spaces, sizes, returns, success, task conventions.

    Args:
        dataset: Minari id or path.
        root: Folder of datasets.
        json: Print an object as JSON.
    """
    from o2o import envs
    from o2o.report.tables import print_json

    console = Console()
    described = envs.describe(dataset, root)
    if json:
        return print_json(described)
    task = {f"task.{key}": value for key, value in vars(described.pop("task")).items()}
    for key, value in {**described, **task}.items():
        if value is not None and value != ():
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            console.print(Text.assemble((key, "bold"), f": {text}"))  # a dataset's words are no markup
    return 0


def data_make(
    name: Name[str],
    root: Path | None = None,
    steps: Count | None = None,
    seed: Seed | None = None,
    processes: Count | None = None,
) -> int:
    """Make a dataset that can be made anywhere: a small one of the toolkit's own, or play data of OGBench.

    An interrupted one goes on when the same command is given again.

    Args:
        name: Name of the dataset, such as pointmaze-umaze or ogbench/scene-play; an unknown name lists them.
        root: Folder to write to; default: MINARI_DATASETS_PATH, else Minari's own.
        steps: OGBench: transitions for training; default: the authors' number.
        seed: OGBench: seed of the episodes; default: 0.
        processes: OGBench: processes that make episodes side by side; default: one for each core.
    """
    from o2o import envs
    from o2o.report.tables import making

    with making(name, Console(stderr=True)) as progress:
        made = envs.make_dataset(name, root, progress, steps=steps, seed=seed, processes=processes)
    print(f"made {', '.join(made)}")
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
    console, in_words = Console(), functools.partial(as_options, names=_options(data_import))
    if dry_run:
        print_plan(*plan_import(path, format, options, place), console, in_words)
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
            planned=lambda plan, licence: print_plan(plan, licence, console, in_words),
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
            print(as_options(problem, OPTIONS), file=sys.stderr)
        print(f"left out {kept.dropped} of {kept.dropped + kept.episodes} episodes; wrote {kept.folder}")
        return 0
    problems = datasets.check(dataset, root)
    for problem in problems:
        print(as_options(problem, OPTIONS), file=sys.stderr)
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


def record(
    id: Name[str],
    env: str,
    policy: str,
    episodes: Count,
    takeover: str | None = None,
    env_kwargs: tuple[str, ...] = (),
    success_key: str | None = None,
    episode_limit: Count | None = None,
    cameras: tuple[str, ...] = (),
    image_size: Count = 64,
    window: bool = False,
    rate: AboveZero | None = None,
    seed: Seed = 0,
    root: Path | None = None,
) -> int:
    """Record episodes in an environment as a new dataset: a policy's, a human's, or a policy's with takeovers.

    Every episode is on disk when it has ended. After a kill the same command goes on.

    Args:
        id: Id of the new dataset, such as lab/pick-v0.
        env: Gymnasium id of the environment, or module:ID.
        policy: module:function, a run folder, an exported file; keyboard or gamepad: a human acts.
        episodes: Number of episodes in the dataset.
        takeover: keyboard, gamepad or module:Class: with it a human takes over from the policy.
        env_kwargs: Arguments of the environment, NAME=VALUE each.
        success_key: Entry of the infos that says whether a step succeeds; default: success or is_success.
        episode_limit: Steps after which an episode is cut; default: the environment's own limit.
        cameras: MuJoCo cameras to render into the observation.
        image_size: Height and width of their images.
        window: Show the environment (render_mode human).
        rate: Steps per second; default: with a human the environment's own, else as fast as it goes.
        seed: Seed of the resets and of the policy.
        root: Folder to write to; default: MINARI_DATASETS_PATH, else Minari's own.
    """
    from o2o.runs.recording import RecordConfig, record as record_episodes

    config = RecordConfig(
        env, policy, takeover, env_kwargs, success_key, episode_limit, cameras, image_size, window, rate, seed
    )
    with Console(stderr=True).status("recording") as status:
        done = record_episodes(
            config, id, episodes, root, lambda at, row: status.update(f"recorded {at} of {episodes} episodes")
        )
    if done.folder is None:
        print(
            f"stopped after {done.episodes} of {episodes} episodes; the same command goes on"
            + (f", and --episodes {done.episodes} makes the dataset of these" if done.episodes else "")
        )
        return 0
    print(f"wrote {done.folder}: {done.episodes} episodes")
    return 0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the cells of a suite or sweep run."""

    where: Literal["local", "ray"] = "local"
    """`local`: one cell after the other in this process; `ray`: as tasks of Ray (needs o2o[ray])."""
    ray: str | None = None
    """Address of a Ray cluster, host:port; default: RAY_ADDRESS, else Ray is started on this machine."""
    cpus: AboveZero = 1.0
    """CPU cores of a cell, with Ray."""
    gpus: NotNegative = 0.0
    """GPUs of a cell, with Ray; 0.5: two cells share one."""
    memory_gb: NotNegative = 0.0
    """Memory in GiB that a node must have free for a cell, with Ray; 0: not looked at."""
    retries: Amount = 3
    """How often a cell goes on from its last checkpoint after its worker or node died, with Ray."""


def bench_run(
    suite: Name[str],
    agents: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    seeds: Count | None = None,
    out: Path | None = None,
    store: str | None = None,
    place: tyro.conf.OmitArgPrefixes[Place] = Place(),
) -> int:
    """Run the cells of a suite that are missing and resume those that were interrupted.

    Args:
        suite: Name of a suite in benchmarks/suites.py, or a Python file that defines SUITE.
        agents: Only these rows of the suite.
        tasks: Only these datasets.
        seeds: Number of seeds; default: the suite's own.
        out: Folder of results, with the runs in OUT/runs; default: benchmarks/results, with the runs in runs/bench.
        store: Address where results and runs are kept too, such as s3://bucket/tried (needs o2o[cloud]); then machines
            need not share a folder.
        place: Where the cells run.
    """
    from o2o.report import jobs
    from o2o.report.suite import load_suite

    found = load_suite(suite)
    with _cells(place, _store(store, found.name, out)) as do:
        return do(jobs.plan(found, agents, tasks, seeds, out))


def _store(address: str | None, suite: str, out: Path | None) -> Any:
    """Return the store at an address, None without one, whose results of a suite are brought to `out` first."""
    if address is None:
        return None
    from o2o.report.jobs import folders
    from o2o.runs.store import Store

    store = Store.checked(address)
    store.mirror(suite, *folders(out))
    return store


@contextlib.contextmanager
def _cells(place: Place, store: Any = None) -> Iterator[Callable[[Sequence[Any]], int]]:
    """Give the function that does planned cells and returns the exit code. Raises `ConfigError` for a bad place."""
    from o2o.report import jobs
    from o2o.runs import session
    from o2o.runs.loggers import Screen

    read(dataclasses.asdict(place), Place)
    console = Console(stderr=True)
    say = lambda text: console.print(text, highlight=False, markup=False)  # noqa: E731

    def finish(planned: Sequence[Any], work: Any) -> int:
        try:
            return jobs.run_jobs(planned, store.around(work) if store else work, say)
        finally:
            if store and planned:
                store.keep(planned[0].results)

    if place.where == "ray":
        from o2o.runs.on_ray import Resources, on_ray

        needs = Resources(place.cpus, place.gpus, place.memory_gb, place.retries)
        work = on_ray(place.ray, needs, say, console, store)
        yield lambda planned: finish(planned, work)
    elif place.ray is not None:
        raise ConfigError("`ray` is the address of a cluster, and `where` is local; say `--where ray` too")
    else:
        with Screen(console) as screen:
            train = lambda cell, path: session.train(session.cell_run(cell, path), path, screen)  # noqa: E731
            do = store.here if store else jobs.attempt
            work = jobs.in_turn(train, lambda path: session.resume(path, screen), say, do)
            yield lambda planned: finish(planned, work)


def sweep(
    file: Name[Path],
    out: Path = Path("runs/sweeps"),
    store: str | None = None,
    place: tyro.conf.OmitArgPrefixes[Place] = Place(),
    json: bool = False,
) -> int:
    """Train all combinations of settings, datasets and seeds of a file, and print their scores, the best first.

    Args:
        file: TOML file, or Python file that defines SWEEP (o2o.report.sweep.Sweep).
        out: Folder of results, with the runs in OUT/runs. A finished cell is never run again.
        store: Address where results and runs are kept too, such as s3://bucket/tried (needs o2o[cloud]); then machines
            need not share a folder.
        place: Where the cells run.
        json: Print the table as JSON.
    """
    from o2o.report import jobs
    from o2o.report.sweep import load_sweep, table
    from o2o.report.tables import print_json, print_scored
    from o2o.runs import session

    found, out = load_sweep(file), out.absolute()  # an environment may change the working folder
    suite = found.suite()
    with _cells(place, _store(store, suite.name, out)) as do:
        planned = jobs.plan(suite, out=out)
        for job in planned:
            if job.state != "finished":
                session.cell_run(job.cell, job.run)  # what is wrong in the file is said before anything is trained
        code = do(planned)
    metric, lines = table(suite, out, found.metric)
    if json:
        print_json([{**vars(line), "metric": metric, "mean": line.mean, "interval": line.interval} for line in lines])
    elif lines:
        print_scored(metric, lines, Console())
    return code


def bench_report(suite: Name[str], out: Path | None = None) -> int:
    """Write a suite's Markdown table and curves from its raw rows.

    Args:
        suite: Name of a suite in benchmarks/suites.py, or a file of a suite or sweep.
        out: Folder of results; default: benchmarks/results.
    """
    from o2o.report.suite_report import write_report

    print(f"wrote {write_report(suite, out)}")
    return 0


def demo(runs: Path = Path("runs"), offline_steps: Amount = 4_000, online_steps: Amount = 8_000, seed: Seed = 0) -> int:
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
    plan = f"{offline_steps} updates on it, then {online_steps} steps in the simulator"
    console.print(f"{plan}; by default two to four minutes on two cores", highlight=False)
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


def check_robot(env: Name[str], steps: Count = 20, scale: AboveZero = 0.05, env_kwargs: tuple[str, ...] = ()) -> int:
    """Check a robot's environment by moving it gently: spaces, flags, arrays, rate, safety wrappers, stop().

    Args:
        env: Gymnasium id, or module:ID.
        steps: Commands to send.
        scale: Their size, as a share of half the action range around its middle.
        env_kwargs: Arguments of the environment, NAME=VALUE.
    """
    from o2o import envs
    from o2o.envs.robot_check import check_robot_env

    robot = envs.bare(env, keyword_arguments(env_kwargs))
    try:
        problems = check_robot_env(robot, steps, scale=scale)
    finally:
        robot.close()
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{env}: {'ok' if not problems else f'{len(problems)} problem(s)'}")
    return 2 if problems else 0


def reward(
    dataset: Name[str],
    out: Name[Path],
    kind: Literal["success", "progress"] = "success",
    root: Path | None = None,
    updates: Count = 2000,
    seed: Seed = 0,
) -> int:
    """Learn a reward from recorded frames: a success classifier, or a model of progress (`o2o.rewards`).

    Args:
        dataset: Minari id or path, with success flags, such as those that `o2o record` writes.
        out: File of the model.
        kind: `success`: does a frame show success; `progress`: how far along the way is it.
        root: Folder of datasets.
        updates: Gradient steps.
        seed: Which episodes are held out, and the minibatches.
    """
    from o2o import rewards

    model = rewards.SuccessClassifier if kind == "success" else rewards.ProgressModel
    config = rewards.FrameModelConfig(updates=updates, seed=seed)
    found = model.fit(rewards.success_frames(dataset, root), config)
    found.save(out)
    told = ", ".join(f"{name} {value:.3g}" for name, value in found.report.items())
    print(f"wrote {out}: on held-out episodes {told}")
    return 0


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
    "diagnose": diagnose,
    "export": export,
    "plot": plot,
    "report": report,
    "balance": balance,
    "record": record,
    "learner": learner,
    "actor": actor,
    "check-robot": check_robot,
    "reward": reward,
    "data": DATA,
    "bench": BENCH,
    "sweep": sweep,
    "demo": demo,
}
GROUPS = {
    "data": "Local datasets: list, describe, make, import, check, export.",
    "bench": "Suites of benchmarks: run, report.",
}


def first_line(thing: Any) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def print_lines(lines: Mapping[str, str]) -> None:
    """Print a name and a line for each, the lines below each other."""
    width = max(map(len, lines))
    for name, line in lines.items():
        print(f"  {name:<{width}}  {line}")


def overview(prog: str, commands: "Commands") -> int:
    """Print a line for each command, and examples."""
    print(f"usage: {prog} COMMAND [options]\n\n{ABOUT if prog == 'o2o' else GROUPS[prog.rpartition(' ')[2]]}\n")
    print_lines({name: first_line(item) if callable(item) else GROUPS[name] for name, item in commands.items()})
    print(EXAMPLES[prog])
    return 0


def _bound(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """Return a function with the same signature that binds its arguments to `command` instead of calling it."""

    @functools.wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(checked(command), *args, **kwargs)

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


def _named(args: Sequence[str]) -> tuple[str, Any]:
    """Return the command that `args` name, such as `o2o data list`, and its function or its commands.

    Raises `ConfigError` for an unknown one: tyro would list all commands; this suggests the nearest.
    """
    known, prog = COMMANDS, "o2o"
    for word in args:
        if callable(known) or word.startswith("-"):
            break
        if word not in known:
            raise ConfigError(f"{prog} has no command {word!r}; {suggest(word, known)}")
        known, prog = known[word], f"{prog} {word}"
    return prog, known


def _options(command: Any) -> set[str]:
    """Return the names that a message to who gave a command may use for its options: the command's own and a run's."""
    return OPTIONS | arguments_of(command) if callable(command) else OPTIONS


def arguments_of(command: Callable[..., Any]) -> set[str]:
    """Return the names of a command's arguments; a group of options, such as `Place`, counts as its members."""
    found = set()
    for param in inspect.signature(command).parameters.values():
        group = dataclasses.is_dataclass(param.default)
        found |= {field.name for field in dataclasses.fields(param.default)} if group else {param.name}
    return found


def _dispatch(args: list[str]) -> int:
    if args == ["--version"]:
        from o2o import __version__

        print(f"o2o {__version__}")
        return 0
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    if args[:1] == ["train"]:  # its options depend on the agent, so tyro reads them later
        return train(tuple(args[1:]))
    if args[:1] == ["learner"]:
        words, listen = listening(args[1:])
        return learner(tuple(words), listen)
    prog, command = _named(args)
    if not callable(command) and (args[-1:] in (["-h"], ["--help"]) or prog == " ".join(["o2o", *args])):
        return overview(prog, command)
    if callable(command):
        args = spelled_out(args, booleans(get_type_hints(command)))
    with one_line(prog):
        bound = _app(COMMANDS).cli(prog="o2o", description=ABOUT, args=args, registry=WORDS, config=WHOLE)
    return bound()


class StandardError(logging.Handler):
    """Print log records as `o2o: message` to whatever `sys.stderr` is then: a progress bar puts its own there."""

    options = OPTIONS
    """Settings that the messages name as options."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; a terminal that has gone away does not end the run."""
        with contextlib.suppress(OSError):
            print(f"o2o: {as_options(self.format(record), self.options)}", file=sys.stderr)


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[StandardError]:
    """Print the messages of logger `o2o` (level INFO and up) to standard error."""
    logger, handler = logging.getLogger("o2o"), StandardError()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = bool(logging.getLogger().handlers)  # absl adds one later, which would print them again
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done (or stopped by a signal with all saved), 2 bad input, 1 anything else."""
    prepare_process()
    with logging_to_stderr() as spoken:
        try:
            given = list(sys.argv[1:] if args is None else args)
            if TRUST in given:
                trust.everywhere()
            given = [arg for arg in given if arg != TRUST]
            with contextlib.suppress(ConfigError):  # of an unknown command
                spoken.options = _options(_named(given)[1])
            code = _dispatch(given)
        except O2OError as error:
            print(f"o2o: error: {in_options(error, spoken.options)}", file=sys.stderr)
            code = 2
    sys.exit(code)
