"""From settings to a finished run: the one place that joins data, tasks, environments, agents, loops and run folders.

The command line, the benchmarks and notebooks all come through here.
"""

import dataclasses
import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from o2o import envs
from o2o.agents import AGENTS
from o2o.closing import Closing
from o2o.config import ABOUT, PRESET, RunConfig, TaskConfig, from_dict, to_dict, with_fields
from o2o.data import datasets
from o2o.data.checks import check_data, returns_scale, summary
from o2o.data.history import with_history
from o2o.data.holdout import split
from o2o.data.normalizer import Normalizer
from o2o.data.recorder import EPISODES, Recorder, export, forget, next_number, recorded
from o2o.data.task import Task
from o2o.envs.maker import EnvMaker
from o2o.envs.shared import OneSimulator
from o2o.errors import ConfigError, O2OError, TrustError
from o2o.files import read_object, write_atomically
from o2o.policies.base import Base, BasePolicy, base_labels, with_base_labels
from o2o.policies.export import Latency, export_policy, latency
from o2o.policies.exported import FILES, load_file
from o2o.policies.python import PythonPolicy, python_policy
from o2o.policies.run import RunPolicy, TrainedPolicy
from o2o.replay.buffer import one_row
from o2o.runs import init_from as warm_start, opened as opened_run
from o2o.runs.folder import DATASET, REPLAY, RunFolder, StopFlag, check_path, guarded, read_config, tell_if_died
from o2o.runs.loggers import Logger, Screen, evaluation_rows, make_loggers, notebook_screen, sent_before
from o2o.runs.presets import agent_class, cell_run, config_class, config_needs, preset_run
from o2o.settings import Amount, Count, NotNegative, Seed, checked
from o2o.train import memory
from o2o.train.collect import BESIDE
from o2o.train.episode import EVAL_STREAM, EnvSlot
from o2o.train.evaluation import Evaluator
from o2o.train.feed import Feed, misfit
from o2o.train.link import Hub
from o2o.train.state import Hooks
from o2o.train.trainer import Trainer
from o2o.trust import HOW, trusted, vouched, voucher
from o2o.types import Agent
from o2o.user_code import origin, source_digest

_log = logging.getLogger(__name__)

__all__ = ["RunConfig", "Session", "TaskConfig", "agent_class", "build", "cell_run", "config_class", "preset_run"]
__all__ += ["evaluate_run", "export_run", "load_base", "load_config", "load_data", "load_policy", "open_agents"]
__all__ += ["open_run", "play_run", "resume", "train", "with_fields"]


LEARNER = "learner.json"
"""The file of a run folder by which robots know the run; only runs that learn from robots elsewhere have it."""
JOINING = 3
"""How often `with_history` holds the joined observations at once."""
TRIED = 8
"""Environments after which it is known what one takes of memory."""


def task_of(config: RunConfig) -> Task:
    """Return the task with the run's changes applied."""
    own = ("binary", "normalize_returns")
    changes = {k: v for k, v in vars(config.task).items() if v is not None and k not in own}
    kwargs, binary = config.environment_arguments(), config.task.binary
    infos = [datasets.info(name) for name in config.dataset]
    tasks = [envs.run_task(about, config.env, binary, kwargs) for about in infos]
    task = dataclasses.replace(tasks[infos.index(datasets.named_first(infos))], **changes)
    if config.task.normalize_returns is None or config.task.reward_scale is not None:
        return task
    scale = returns_scale(config.dataset, task, config.task.normalize_returns, **_reading(config))
    return dataclasses.replace(task, reward_scale=scale)


def _reading(config: RunConfig) -> dict[str, Any]:
    """Return how the files of a run's datasets are read (`datasets.load`)."""
    return {
        "achieved_goal": config.task.achieved_goal,
        "clip_actions": config.clip_actions,
        "skip_bad_episodes": config.skip_bad_episodes,
        "action_range": config.action_range,
        "env": config.env,
    }


def _check_scale(config: RunConfig) -> None:
    """Raise `ConfigError` if the reward scale was given too and is not what normalised returns ask for."""
    given, span = config.task.reward_scale, config.task.normalize_returns
    if given is None or span is None:
        return
    wanted = task_of(with_fields(config, [("task.reward_scale", None)])).reward_scale
    if given != wanted:
        raise ConfigError(
            f"task.reward_scale is {given:g}, but task.normalize_returns {span:g} asks for {wanted:g}: give one of them"
        )


def base_of(config: RunConfig) -> BasePolicy | None:
    """Return the base policy of a run, None if it has none.

    Raises `ConfigError` if its agent needs a base and there is none, or takes none and there is one.
    """
    takes = config_needs(config.agent).base_policy
    if config.base is None and takes:
        raise ConfigError(
            f"agent {config.agent} corrects a base policy, and there is none: give `base`: a run folder, a .onnx, "
            ".jax or .pt file, or module:function"
        )
    if config.base is None:
        return None
    if not takes:
        takers = [name for name in AGENTS if config_needs(name).base_policy]
        raise ConfigError(f"agent {config.agent} takes no base policy (base={config.base}); those that do: {takers}")
    return load_base(config.base, config.base_seed_index, config.base_sample)


def load_base(spec: Any, seed_index: int = 0, sample: bool = False) -> BasePolicy:
    """Return the base policy of a run folder, an exported or TorchScript file, `module:name`, or a Python object.

    `seed_index`: which seed of a run, from 0. `sample`: draw from a run's policy in place of its mode. See
    `o2o.policies.python.python_policy` for what a Python object must do. Raises `ConfigError`, `RunError` or
    `CheckpointError`.
    """
    if callable(spec) or hasattr(spec, "act"):
        return python_policy(spec)
    path, text = Path(str(spec)), str(spec)
    if path.suffix in FILES and ":" not in text:
        return load_file(path)
    if os.path.isdir(path):  # no exception for a name that no path can have
        return run_policy(path, seed_index, sample)
    if ":" in text:
        return python_policy(text)
    raise ConfigError(
        f"base {spec!r} is none that o2o knows: give a run folder, a .onnx, .jax or .pt file, or module:function"
    )


def run_policy(path: str | Path, seed_index: int, sample: bool = False, which: str = "latest") -> RunPolicy:
    """Return the agent of one seed of a run at checkpoint `which` (`open_agents`) as a base policy."""
    return policy_of(Path(path), open_agents(path, which), seed_index, sample)


def policy_of(path: Path, opened: opened_run.Opened, seed_index: int, sample: bool = False) -> RunPolicy:
    """Return the agent of one seed of the run in folder `path` as a base policy."""
    config = opened.settings
    if not 0 <= seed_index < config.seeds:
        raise ConfigError(f"base_seed_index is {seed_index}; run {path} has {config.seeds} seed(s), numbered from 0")
    return RunPolicy.of(
        str(path),
        opened.agent_of(seed_index),
        opened.normalizer,
        opened.data,
        history=config.history,
        deterministic=not sample,
        inner=base_unchanged(path, config),
    )


def load_data(config: RunConfig, base: BasePolicy | None = None) -> datasets.Dataset:
    """Load the run's dataset with its task's rewards; observations get their history and the base's actions.

    `base`: the run's base policy, if it is loaded already.
    """
    return _seen_with(base or base_of(config), config, _load_rows(config))


def _load_rows(config: RunConfig) -> datasets.Dataset:
    """Load the run's dataset without history and base actions."""
    needs = config.config.needs
    return datasets.load(
        config.dataset,
        task=task_of(config),
        weights=config.weights or None,
        discount=config.config.discount if "mc_returns" in needs.batch_keys else None,
        action_margin=needs.action_margin,
        **_reading(config),
    )


def _seen_with(base: BasePolicy | None, config: RunConfig, data: datasets.Dataset) -> datasets.Dataset:
    """Return the dataset as the run's agent sees it: with the history, and with the base's actions if there is one."""
    if config.history > 1:
        joining = {"joined observations": JOINING * memory.tree_bytes(data.arrays["observations"]) * config.history}
        memory.refuse(joining, memory.free_on_host(), "the host", f"lower `history`, which is {config.history}")
    if base is None:
        return with_history(data, config.history)
    labels = base_labels(base, data, config.base_labels, config.base_timeout_s)
    return with_base_labels(with_history(data, config.history), *labels)


def make_env(
    config: RunConfig, data: datasets.Dataset, base: BasePolicy | None = None, evaluation: bool = False, **options: Any
) -> Any:
    """Make one environment of a run; `options` go to `o2o.envs.make`. With a base, observations hold its action."""
    return env_maker(config, data, base)(evaluation, **options)


def env_maker(
    config: RunConfig, data: datasets.Dataset, base: BasePolicy | None = None, recorder: Any = None
) -> EnvMaker:
    """Return the maker of a run's environments; `recorder` goes around the training ones (`o2o.envs.wrap`, `inner`)."""
    make = partial(
        envs.make, config.env or _specification(data.info), data.task, achieved_goal=config.task.achieved_goal,
        dataset=data.info, history=config.history, action_map=data.action_map, cameras=config.cameras,
        image_size=config.image_size, env_kwargs=config.environment_arguments(), episode_limit=config.episode_limit,
        simulator=None if config.loop.eval_envs else OneSimulator(),
    )  # fmt: skip
    if base is None:
        return EnvMaker(make, recorder)
    return EnvMaker(
        make, recorder, partial(_with_base, policy=base, data=data.without_rows(), timeout_s=config.base_timeout_s)
    )


def _specification(about: datasets.DatasetInfo) -> Any:
    """Return the specification of a dataset's environment, which other processes may not have registered.

    Where there is none that may run, it is the dataset, so that whoever makes an environment learns why.
    """
    try:
        return envs.specification(about)
    except O2OError:
        return about


def _with_base(env: Any, policy: BasePolicy, data: datasets.Dataset, timeout_s: float | None) -> Any:
    return envs.BaseAction(env, Base(policy, data, timeout_s))


def without_environment(config: RunConfig, about: datasets.DatasetInfo, learner: bool = False) -> bool:
    """Whether a run makes no environment and is judged by offline estimates.

    Raises `ConfigError` if that is asked for together with an online phase, unless robots play it for a `learner`.
    """
    if config.online_steps and not learner:
        if config.offline_estimate:
            raise ConfigError("offline_estimate is for runs without an online phase: set `online_steps` to 0 too")
        return False
    return config.offline_estimate or (config.env or about.eval_env_spec or about.env_spec) is None


def build(
    config: RunConfig,
    data: datasets.Dataset | None = None,
    hooks: Hooks | None = None,
    folder: Path | None = None,
    base: BasePolicy | None = None,
    begins: bool = True,
    hub: Hub | None = None,
) -> Trainer[Agent]:
    """Return the trainer of a run, nothing done yet; `folder` is for what it records and for replay on disk.

    `data` and `base` spare loading what the settings name once more. Only where the run `begins`, and does not go on
    from a checkpoint of its online phase, are agents taken from its `init_from`. `hub`: where robots send transitions.
    """
    base = base or base_of(config)
    found = data or load_data(config, base)
    comparable = opened_run.in_own_environment(config, found)
    scores = {key: found.info.metadata.get(key) if comparable else None for key in ("ref_min_score", "ref_max_score")}
    about = {"algorithm_name": config.agent, **{key: score for key, score in scores.items() if score is not None}}
    recorder = None
    if config.record and folder is not None:
        recorder = partial(Recorder, folder=folder / EPISODES, task=found.task, metadata=about)
    env_fn = env_maker(config, found, base, recorder)
    held = None
    if without_environment(config, found.info, folder is not None and (folder / LEARNER).exists()):
        found, held = split(found, config.holdout)
    normalizer = Normalizer.fit(found.arrays["observations"], floor=config.std_floor) if config.normalize else None
    trainer = Trainer(
        agent_class(config.agent), config.config, found, env_fn, seed=config.seed, seeds=config.seeds, loop=config.loop,
        normalizer=normalizer, hooks=hooks, storage=None if folder is None else folder / REPLAY, held=held,
        hub=hub,
    )  # fmt: skip
    check_data(trainer.agent, found, config.normalize)
    if not comparable:
        trainer.evaluator.normalized = None
    if config.init_from is not None and begins:
        _start_from(trainer, config)
    return trainer


def _start_from(trainer: Trainer, config: RunConfig) -> None:
    """Put the pre-trained agents of another run into the trainer, in place of its own pre-training."""
    target = agent_class(config.agent)
    source_config = load_config(Path(str(config.init_from)))
    warm_start.check_settings(source_config, config)
    source = open_agents(str(config.init_from))
    warm_start.check_trained(source, source_config, str(config.init_from))
    warm_start.check_values(source, trainer, str(config.init_from))
    warm_start.take_over(trainer, source, target, config)


def unchanged(path: Path, config: RunConfig) -> tuple[datasets.Dataset, BasePolicy | None]:
    """Load the dataset and the base policy of the run in folder `path`.

    Raises `ConfigError` unless both are what they were when the run began. The dataset is compared before the base is
    loaded, and the base before it acts.
    """
    begun, data = read_config(path), _load_rows(config)
    if (wanted := begun.get("fingerprint")) != data.fingerprint:
        raise ConfigError(
            f"dataset {data.info.name} changed since run {path} began: fingerprint {data.fingerprint}, was {wanted}; "
            "restore the dataset or start a new run"
        )
    base = base_unchanged(path, config)
    return _seen_with(base, config, data), base


def base_unchanged(path: Path, config: RunConfig) -> BasePolicy | None:
    """Load the base policy of the run in folder `path`, None if it has none.

    Raises `ConfigError` unless it is what it was when the run began. A changed Python file is a warning.
    """
    begun, base = read_config(path), base_of(config)
    if base is not None and base.fingerprint != begun.get("base_fingerprint"):
        raise ConfigError(
            f"base {config.base} changed since run {path} began; restore it as it was, or start a new run"
        )
    if isinstance(base, PythonPolicy) and begun.get("base_source") not in (None, source_digest(base.name)):
        _log.warning("the code of base %s changed since run %s began: the policy may act otherwise", config.base, path)
    return base


def _to_look_at(config: RunConfig) -> RunConfig:
    """Return the settings of a run for who will not train it: no records, no processes."""
    loop = dataclasses.replace(config.loop, eval_process=False, env_processes=0)
    return dataclasses.replace(config, record=False, loop=loop)


def load_config(path: str | Path) -> RunConfig:
    """Return the settings of a run folder. Raises `TrustError` where they name code that the user did not name."""
    path = Path(path)
    values = read_config(path)
    _check_code(path, values)
    return settings_of(values, f"{path}/config.json")


def settings_of(values: Mapping[str, Any], where: str) -> RunConfig:
    """Return the settings that a config.json holds as `values`; errors begin with `where`."""
    values = dict(values)
    for name in ABOUT:
        values.pop(name, None)
    agent_config = values.pop("config", {})
    if not isinstance(values.get("agent"), str):
        raise ConfigError(f"{where} agent: got {values.get('agent')!r}; expected the name of an agent")
    config = from_dict(config_class(values["agent"]), agent_config, f"{where} config")
    return dataclasses.replace(from_dict(RunConfig, {**values, "config": None}, where), config=config)


def _code_of(values: Mapping[str, Any]) -> list[str]:
    """Return what the settings of a run name that runs as code: modules of agent and environment, a base in code."""
    base = values.get("base")
    found = [str(name) for name in (values.get("agent"), values.get("env")) if ":" in str(name or "")]
    if base and not os.path.isdir(str(base)) and (":" in str(base) or not str(base).endswith(".onnx")):
        found.append(str(base))
    return found


def _check_code(path: Path, values: Mapping[str, Any]) -> None:
    """Raise `TrustError` if the settings of a run folder name code, and neither the user nor a run of the user did."""
    code = _code_of(values)
    imported = lambda name: name != values.get("base") and name.rpartition(":")[0] in sys.modules  # noqa: E731
    unknown = [name for name in code if origin(name) is not None and not imported(name)]
    if unknown and not vouched(values.get("vouched"), code) and not trusted(path):
        raise TrustError(
            f"run {path} would run {' and '.join(unknown)}, and it was not begun by you on this machine with the code "
            f"that lies there now: look at it; {HOW}"
        )


class Session:
    """A run being trained: its folder, screen, loggers and trainer."""

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        data: datasets.Dataset,
        screen: Screen | None = None,
        base: BasePolicy | None = None,
        hub: Hub | None = None,
    ) -> None:
        """Build the trainer and connect it to the run folder; `hub` is where robots send transitions."""
        self.config, self.run, self.screen, self.hub = config, run, screen, hub
        self.loggers: list[Logger] = []
        self.stop = StopFlag()
        saving = {"checkpoint": self._save, "scored": run.scored}
        hooks = Hooks(metrics=self._metrics, episodes=self._episodes, should_stop=self.stop, **saving)
        if screen is not None:
            hooks.progress = screen.progress
        begins = not run.online  # reads the latest checkpoint
        self.trainer = build(config, data, hooks, run.path, base, begins, hub)
        try:
            self._needed = self.trainer.check_memory(config.online_steps)
        except BaseException:
            self.trainer.close()
            raise
        if config.init_from is not None and begins:  # its networks are those of the agents that it starts from
            self.config = dataclasses.replace(config, config=self.trainer.agent.config)
            run.change(config=to_dict(self.config.config))
        self.trainer.forget_rows()
        try:
            self._sent = sent_before(config.loggers, run.path)
            self.loggers += make_loggers(config.loggers, run.path, to_dict(self.config))
        except BaseException:
            self.trainer.close()
            raise

    def _save(self, trainer: Trainer) -> None:
        self.run.save(trainer)
        if trainer.feed is not None:
            trainer.feed.saved()

    def _metrics(self, row: dict[str, Any]) -> None:
        self.run.metrics.write(row)
        self._tell(row)

    def _tell(self, row: dict[str, Any]) -> None:
        for logger in self.loggers if row not in self._sent else ():
            logger.metrics(row)
        if self.screen is not None and (advice := self.trainer.agent.advice(row)):
            self.screen.advice(advice)

    def _episodes(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.run.episodes.write(row)
        for row in evaluation_rows(rows):
            self._tell(row)
        if self.screen is not None:
            self.screen.episodes(rows)

    def __repr__(self) -> str:
        return f"Session({str(self.run.path)!r}, {self.trainer!r})"

    def work(self) -> bool:
        """Train to the end; False if a signal stopped it (the state is saved)."""

        def phases() -> bool:
            if self.config.init_from is None and not self.trainer.offline(self.config.offline_steps):
                return False
            return self.config.online_steps == 0 or self.trainer.online(self.config.online_steps)

        _log.info("memory: %s", ", ".join(f"{name} {memory.size_of(size)}" for name, size in self._needed.items()))
        with Closing() as closing:
            closing.callback(self.run.close)
            for logger in self.loggers:
                closing.callback(logger.close)
            closing.callback(self.trainer.close)
            if self.hub is not None and self.trainer.feed is not None:
                self._listen(self.hub, self.trainer.feed)
                closing.callback(self.hub.close)
            with self.stop, self.screen or nullcontext():
                finished = guarded(self.run, self.trainer, phases, lambda: self.stop.forced)
            if finished and self.trainer.feed is not None:
                self.trainer.feed.finish()
        if finished and self.config.record and recorded(self.run.path):
            export(self.run.path)
        return finished

    def _listen(self, hub: Hub, feed: Feed) -> None:
        """Answer robots from now on: the run goes on behind the rows that it has stored."""
        example = one_row(self.trainer.replay.data.rows)
        about = {
            "run": read_object(self.run.path / LEARNER)["run"],
            "settings": to_dict(self.config),
            "dataset": read_object(self.run.path / DATASET),
            "base": read_config(self.run.path).get("base_fingerprint"),
        }
        hub.start(about, feed.stored, lambda row: misfit(row, example))
        _log.info("robots: `o2o actor --learner %s:%d`", *hub.address)


def _from_anywhere(config: RunConfig) -> RunConfig:
    """Return the settings with absolute paths in place of relative ones: environments change the working folder."""

    def absolute(text: Any) -> Any:
        return str(Path(text).absolute()) if isinstance(text, str | Path) and Path(text).exists() else text

    dataset = tuple(absolute(name) for name in config.dataset)
    return dataclasses.replace(
        config, dataset=dataset, base=absolute(config.base), init_from=absolute(config.init_from)
    )


def check_learner(config: RunConfig) -> None:
    """Raise `ConfigError` unless robots can act for a run elsewhere (`o2o.runs.actor`)."""
    off_policy = config.config.online.replay not in ("rollout", "none")
    for name, wrong, expected in (
        ("agent", ":" in config.agent, "an agent of the toolkit's own: actors run no code that a learner names"),
        ("agent", not off_policy, "an agent that learns online from a replay, such as wsrl, rlpd or sac"),
        ("agent", config.config.needs.episode_returns, "an agent that does not schedule itself by whole episodes"),
        ("seeds", config.seeds != 1, "1: all robots act for one agent"),
        ("online_steps", config.online_steps == 0, "more than 0: the transitions that robots send"),
        ("record", config.record, "False: the environment is elsewhere; `o2o record` there writes datasets"),
    ):
        if wrong:
            raise ConfigError(f"{name} is {getattr(config, name)!r}, and the run is a learner's; expected {expected}")


def train(
    config: RunConfig, path: str | Path, screen: Screen | None = None, quiet: bool = False, hub: Hub | None = None
) -> bool:
    """Train a new run in folder `path`; False if a signal stopped it. Raises `RunError` if the folder exists.

    Progress goes to `screen`; without one, in a notebook, below the cell, unless `quiet`. With a `hub`, robots send the
    transitions of the online phase (`o2o.runs.actor`), and the run's own environment only evaluates.
    """
    path, screen = Path(path), screen or notebook_screen(quiet)
    check_path(path)
    if hub is not None:
        check_learner(config)
    path, config = path.absolute(), _from_anywhere(config)
    base = base_of(config)
    data, preset = load_data(config, base), _preset_of(config)
    if config.task.normalize_returns is not None:  # said in config.json, so that a resume has the very same
        _check_scale(config)
        config = with_fields(config, [("task.reward_scale", data.task.reward_scale)])
    about = {"fingerprint": data.fingerprint, "dataset_summary": summary(data)}
    about |= {} if base is None else {"base_fingerprint": base.fingerprint}
    about |= {"base_source": source_digest(base.name)} if isinstance(base, PythonPolicy) else {}
    about |= {"vouched": voucher(code)} if (code := _code_of(to_dict(config))) else {}
    with Closing() as held:  # environments that are made before anything is learnt
        make, env = env_maker(config, data, base), None
        if without_environment(config, data.info, hub is not None):
            _log.info("no environment: the run is judged by the error of its actions on held-out episodes (`holdout`)")
        else:
            env = make(False)
            held.callback(env.close)
            _check_environment(env, make, config, data.info)
        if config.init_from is not None:
            load_config(Path(config.init_from))
        run = RunFolder.create(path, {**to_dict(config), **about}, config.keep_checkpoints)
        try:
            run.describe(data, None if env is None else env.metadata.get("render_fps"))
            if preset is not None:
                write_atomically(run.path / PRESET, json.dumps(to_dict(preset), indent=2) + "\n")
            if hub is not None:
                write_atomically(run.path / LEARNER, json.dumps({"run": uuid.uuid4().hex}) + "\n")
            session = Session(config, run, data, screen, base, hub)
            del data  # what is learnt from is in the trainer's replay
            with Closing() as closing:
                closing.callback(session.trainer.close)
                if env is not None and env.metadata.get("replayable", True):
                    _rehearse(session.trainer, 0 if hub else config.online_steps, make, env, held)
                closing.pop_all()
        except BaseException:
            run.close()
            shutil.rmtree(path)  # nothing has been done: the corrected command may have the name
            raise
    return session.work()


def _check_environment(env: Any, make: EnvMaker, config: RunConfig, about: datasets.DatasetInfo) -> None:
    """Say what is to be known of a run's environment `env`. Raises `ConfigError` for hardware that cannot do the run.

    Of hardware a second object, to evaluate in, is made beside the first.
    """
    if config.episode_limit is None and envs.endless(config.env or about):
        _log.warning(
            "environment %s has no time limit: episodes are cut after %d steps, so that evaluations end; set "
            "`episode_limit` for another limit",
            config.env or about.env_id,
            envs.limit_for(about),
        )
    if env.metadata.get("replayable", True):
        return
    if config.loop.eval_process:
        raise ConfigError(BESIDE)
    if config.online_steps:
        try:
            second = make(True)
        except O2OError as error:
            raise ConfigError(
                f"a second object of the environment cannot be made beside the first ({error}): a run holds one to "
                "train in and one to evaluate in, never both in motion, so let them share the connection, or set "
                "`loop.eval_envs` to 0"
            ) from error
        with Closing() as closing:
            closing.callback(second.close)


def _preset_of(config: RunConfig) -> RunConfig | None:
    """Return the run of the preset that a run's settings are compared with; None if its agent has none for the task."""
    try:
        size = config.preset if config.preset in ("paper", "small") else "paper"
        return preset_run(config.agent, config.dataset, size, config.env)
    except Exception as error:  # an agent of the user's own may raise anything; the run needs no comparison
        _log.info("no preset of %s to compare with: %s", config.agent, error)
        return None


def _rehearse(trainer: Trainer, online_steps: int, make: EnvMaker, first: Any, held: Closing) -> None:
    """Make as many environments at once as the run will hold, so that one too many fails before anything is learnt.

    The training environments, of which `first` is there, go to `held`; those for evaluation are kept. Raises
    `ConfigError`.
    """
    training, made = trainer.seeds * trainer.envs_per_seed if online_steps else 0, 0
    if not training:
        held.close()
    beside = min(trainer.loop.eval_envs, trainer.loop.eval_episodes)
    began, wanted = memory.of_process(), training + trainer.seeds * beside
    try:
        while made < training:
            env = make(False) if made else first
            if made:
                held.callback(env.close)
            env.reset(seed=0)
            made += 1
            if made == TRIED:
                each = max(memory.of_process() - began, 0) // (TRIED - 1)
                rest = {f"{wanted - made} more environments": (wanted - made) * each}
                memory.refuse(rest, memory.free_on_host(), "the host", "lower `seeds` or config.online.num_envs")
        trainer.evaluator.prepare()
    except O2OError as error:
        if made == 0:
            raise
        share = ", or set `loop.eval_envs` to 0, so that training and evaluation take turns in one"
        raise ConfigError(
            f"the run needs {training} environments to train in and {trainer.seeds} to evaluate in at once, and "
            f"{made} can be had ({error}): train fewer seeds, or only on the dataset (online_steps 0)"
            + share
            * (training == 1)
        ) from error


@checked
def resume(
    path: str | Path,
    screen: Screen | None = None,
    online_steps: Amount | None = None,
    quiet: bool = False,
    hub: Any = None,
) -> bool:
    """Continue a run from its last checkpoint, as if it had never stopped; True at once if it had finished.

    Without any checkpoint it begins again. `online_steps`: until so many environment steps instead of those in its
    config.json, which is changed. Raises `ConfigError` if the run has made more of them, or has its replay on disk,
    which cannot grow: nothing has been moved or written then. Progress is shown as by `train`. A learner's run needs a
    `hub`, as `train` does, and no other run takes one (`ConfigError`).
    """
    path, screen = Path(path).absolute(), screen or notebook_screen(quiet)
    config = load_config(path)
    if (path / LEARNER).exists() != (hub is not None):
        raise ConfigError(
            f"run {path} learns from its own environment: go on with `o2o resume {path}`"
            if hub is not None
            else f"run {path} learns from robots elsewhere: go on with `o2o learner {path}`"
        )
    data, base = unchanged(path, config)
    if online_steps and hub is None and without_environment(config, data.info):
        raise ConfigError(
            f"run {path} was trained without an environment; to fine-tune, begin another run with its data and `env`"
        )
    tell_if_died(path)
    run = RunFolder.open(path, config.keep_checkpoints).lock()
    with Closing() as closing:
        closing.callback(run.close)
        if online_steps is not None:
            run.check_steps(online_steps, config.loop.replay_capacity)
        session = Session(config, run, data, screen, base, hub)
        del data
        closing.callback(session.trainer.close)
        run.load(session.trainer, config.online_steps)
        if online_steps is not None:
            session.config = dataclasses.replace(config, online_steps=online_steps)
            run.change(online_steps=online_steps)
        slots = [] if session.trainer.fleet is None else session.trainer.fleet.slots
        for slot in slots:
            if not slot.exact:  # what comes is not what was there: it is counted behind that
                slot.episode = max(slot.episode, next_number(path / EPISODES, slot.seeds))
        forget(path, {slot.seeds: slot.episode for slot in slots})
        closing.pop_all()
    return session.work()


def open_run(path: str | Path, which: str | int = "latest") -> tuple[RunConfig, Trainer[Agent]]:
    """Return a run's settings and its trainer at the `latest` or `best` checkpoint, or at a step.

    The trainer holds the run's dataset. `open_agents` returns what acts, without any data.
    """
    path = Path(path).absolute()
    config = load_config(path)
    run = RunFolder.open(path)
    step = opened_run.step_of(run.checkpoints, str(which))
    data, base = unchanged(path, config)
    trainer = build(_to_look_at(config), data, folder=path, base=base, begins=False)
    run.load(trainer, config.online_steps, step, go_on=False)
    run.close()
    return config, trainer


def open_agents(path: str | Path, which: str | int = "latest") -> opened_run.Opened:
    """Return a run's agents at a checkpoint (see `open_run`), and what they need to act; its dataset may be elsewhere.

    A run folder without a dataset.json (of o2o before it wrote one) needs its dataset.
    """
    path = Path(path).absolute()
    config = load_config(path)
    tell_if_died(path)
    data, rate = opened_run.read_dataset(path) or (unchanged(path, config)[0].without_rows(), None)
    return opened_run.load(path, config, data, rate, str(which))


@checked
def load_policy(
    path: str | Path,
    which: str | int = "latest",
    seed_index: int = 0,
    sample: bool = False,
    guidance: NotNegative | None = None,
) -> TrainedPolicy:
    """Return the policy of one seed of a run at a checkpoint, for any loop: `reset`, `act`, `interrupt`.

    It acts by its mode, or with `sample` draws its actions. `guidance` is the weight of `Opened.guided`. It is compiled
    here, not in its first step. The run's dataset is not needed; its base policy, if it has one, must be where it was.
    Raises `ConfigError` if the run has no such seed, `CheckpointError` if it has no such checkpoint.
    """
    path = Path(path)
    check_seed_index(path, seed_index)
    opened = open_agents(path, which).guided(guidance)
    return TrainedPolicy(policy_of(path, opened, seed_index, sample), opened.rate)


@checked
def export_run(
    path: str | Path,
    out: str | Path,
    which: str | int = "latest",
    seed_index: int = 0,
    sample: bool = False,
    guidance: float | None = None,
) -> dict[str, Latency]:
    """Write the policy of one seed of a run to `out` (`.onnx` or `.jax`) and its contract beside it.

    Returns the latency of the agent's own call and of the file's, by name. Raises as `load_policy` and
    `o2o.policies.export.export_policy` do.
    """
    path, out = Path(path), Path(out)
    check_seed_index(path, seed_index)
    opened = open_agents(path, which).guided(guidance)
    policy = policy_of(path, opened, seed_index, sample)
    export_policy(
        policy, out, opened.rate, {"run": path.name, "agent": opened.settings.agent, "step": opened.counters.point}
    )
    return {str(path): latency(policy, policy.data), str(out): latency(load_file(out), policy.data)}


def check_seed_index(path: str | Path, seed_index: int) -> None:
    """Raise `ConfigError` unless a run has a seed of this index."""
    seeds = load_config(path).seeds
    if not 0 <= seed_index < seeds:
        raise ConfigError(f"no seed of index {seed_index}: {path} trained {seeds} seed(s), counted from 0")


@checked
def evaluate_run(
    path: str | Path,
    episodes: Count = 50,
    which: str | int = "latest",
    seed: Seed = 1,
    deterministic: bool = True,
    guidance: NotNegative | None = None,
) -> list[dict[str, Any]]:
    """Play `episodes` new episodes with every seed of a run and return one row per episode.

    `seed` is that of the resets, `guidance` the weight of `Opened.guided`. Raises `ConfigError` for a number out of
    range.
    """
    path = Path(path)
    opened = open_agents(path, which).guided(guidance)
    env_fn = env_maker(opened.settings, opened.data, base_unchanged(path, opened.settings))
    evaluator = Evaluator(env_fn, opened.settings.seeds, episodes, seed, opened.normalized)
    with Closing() as closing:
        closing.callback(evaluator.close)
        return evaluator(opened.agent, opened.normalizer, 0, deterministic)


@checked
def play_run(
    path: str | Path,
    out: str | Path | None,
    episodes: Count = 1,
    which: str | int = "latest",
    seed_index: Amount = 0,
    seed: Seed = 1,
) -> list[dict[str, Any]]:
    """Play episodes with one seed of a run and return their rows.

    `out`: a video file; None: a window on the screen. Raises `ConfigError` for settings out of range, an unknown kind
    of video file or a missing display.
    """
    from o2o.policies.video import check_out, check_window, record

    path = Path(path)
    out = None if out is None else Path(out).absolute()  # an environment may change the working folder
    check_out(out) if out is not None else check_window()
    check_seed_index(path, seed_index)
    opened = open_agents(path, which)
    mode = "human" if out is None else "rgb_array"
    env = make_env(opened.settings, opened.data, base_unchanged(path, opened.settings), True, render_mode=mode)
    slot = EnvSlot(env, (seed + seed_index, EVAL_STREAM, 0))
    with Closing() as closing:
        closing.callback(env.close)
        return record(slot, opened.agent_of(seed_index), opened.normalizer, episodes, out)
