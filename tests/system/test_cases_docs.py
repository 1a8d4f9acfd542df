"""README and docs: every command and snippet runs, every figure is committed, every page is built.

A training command with a --name is run, with tiny networks and few steps; one without is read with all of its settings,
on its real dataset. Suites, videos, the demo and installers are only checked against what exists; other tests run them.
"""

import dataclasses
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from o2o import cli
from o2o.agents import AGENTS
from o2o.data import datasets
from o2o.envs import TASKS
from o2o.envs.pointmaze import EMBEDDED
from o2o.runs import session
from o2o.usage import WORDS
from tests.conftest import narrow
from tests.helpers import foreign
from tests.system.test_readme import BLOCKS

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEPS = {"3_000": "20", "2_000": "100"}
ONLY_READ = (["demo"], ["play"], ["bench", "run"], ["bench", "report", "--out"], ["sweep"], ["actor"])


def commands_of(page: str) -> list[list[str]]:
    """Return the words of every command of a page."""
    blocks = [text for kind, text in FENCE.findall((ROOT / page).read_text()) if kind == "bash"]
    return [words for line in "\n".join(blocks).splitlines() if (words := shlex.split(line, comments=True))]


TRAININGS = {
    words[words.index("--name") + 1]: words[2:]
    for page in PAGES
    for words in commands_of(page)
    if words[:2] in (["o2o", "train"], ["o2o", "learner"]) and "--name" in words
}


def main(*args: str) -> None:
    """Run a command; it must end well."""
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert not ended.value.code, args


class Sandbox:
    """A folder in which a reader follows the pages. What an earlier page would have made is made when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, set[tuple[str, ...]]()
        self.processes: list[subprocess.Popen[bytes]] = []

    def follow(self, page: str) -> None:
        """Do what a page says, in its order."""
        scope: dict[str, Any] = {"__name__": "page"}
        for kind, text in FENCE.findall((ROOT / page).read_text()):
            if kind == "bash":
                for line in text.splitlines():
                    if words := shlex.split(line, comments=True):
                        self.command(words)
            elif match := re.match(r"# (\w+\.py)\n", text):
                (self.folder / match[1]).write_text(text)
            elif page == "docs/robot.md" or text not in BLOCKS:
                for steps, fewer in STEPS.items():
                    text = text.replace(steps, fewer)
                exec(compile(text, page, "exec"), scope)

    def command(self, words: list[str]) -> None:
        """Run a command, or check what of it can be checked."""
        name, *args = words
        if name == "o2o":
            if tuple(args) not in self.done:
                self.o2o(args)
            self.done.add(tuple(args))
        elif name == "make":  # its targets are tried by whoever builds
            assert re.search(rf"^{args[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif name == "pip":
            extras = re.findall(r"\[(\w+)\]", " ".join(args))
            assert args[0] == "install" and set(extras) <= set(PROJECT["optional-dependencies"]), words
        elif name == "cp":
            shutil.copy(ROOT / args[0], self.folder)
        elif words[0] == "python" and words[-1] == "&":
            self.processes.append(subprocess.Popen([sys.executable, *args[:-1]], cwd=self.folder))
        elif words[:2] == ["python", "-c"]:
            exec(args[1], {})
        elif words[:2] == ["python", "examples/deploy.py"]:
            pytest.importorskip("onnxruntime")
            runpy.run_path(str(ROOT / args[0]))["main"](args[1])
        else:
            assert name == "apt" or (name == "python" and (ROOT / args[0]).exists()), f"no test knows {words}"

    def o2o(self, args: list[str]) -> None:
        """Run a command of o2o's on small things."""
        for made in re.findall(r"runs/([\w-]+)", " ".join(args)):
            self.trained(made)
        if args[:2] == ["data", "make"] and args[2].startswith("ogbench/"):
            pytest.importorskip("ogbench", reason="OGBench is not installed: the page of its data is not followed")
            main(*args[:3], "--steps", "30", "--processes", "1")
        elif args[0] == "train" and "--help" not in args:
            name = args[args.index("--name") + 1] if "--name" in args else None
            _ = self.trained(name) if name else cli.parse_train(args[1], args[2:])
        elif args[0] == "learner":
            words, listen = cli.listening(args[1:])
            assert listen == cli.LISTEN and cli.parse_train(words[0], words[1:])
            if "--name" in words:  # trained in one process here
                self.trained(words[words.index("--name") + 1])
        elif any(set(words) <= set(args) for words in ONLY_READ):
            cli._app(cli.COMMANDS).cli(prog="o2o", args=args, registry=WORDS, config=cli.WHOLE)
        elif args[:2] == ["data", "check"] and "--drop-bad" not in args:
            assert datasets.check(args[2]) == []
        elif args[0] == "reward":
            main(*args, "--updates", "20")
        else:
            for option, fewer in (("--episodes", "1"), ("--online-steps", "60")):
                if option in args:
                    args = [*args[: args.index(option) + 1], fewer, *args[args.index(option) + 2 :]]
            main(*[str(self.folder / "lift.hdf5") if arg == "PATH" else arg for arg in args])

    def trained(self, name: str) -> None:
        """Train the run of a name as its page says, with tiny networks and few steps."""
        if (self.folder / "runs" / name).exists():
            return
        agent, *rest = TRAININGS[name]
        for made in re.findall(r"runs/([\w-]+)", " ".join(rest)):
            self.trained(made)
        path, run = cli.parse_train(agent, rest)
        fields = [("batch_size", 16), ("online.min_rows", 0), *narrow(run.config)]
        fields += [(f"online.{n}", 20) for n in ("warmup_steps", "random_steps") if getattr(run.config.online, n)]
        fields += [("online.initial_updates", 5)] if run.config.online.initial_updates else []
        loop = {"eval_every": 0, "eval_episodes": 1, "log_every": 20, "updates_per_dispatch": 10}
        online = 200 if run.record else 50  # an episode must end to be recorded
        steps = {"offline_steps": min(run.offline_steps, 20), "online_steps": min(run.online_steps, online)}
        changes = {"config": dict(fields), "loop": loop, "base_timeout_s": None, **steps}
        changes["offline_estimate"] = run.offline_estimate and not run.online_steps  # a learner is one process here
        assert session.train(session.with_fields(run, changes), path)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory, embedded_root: Path) -> Iterator[Sandbox]:
    """Return a folder with the embedded dataset, a file to import, the examples and the committed rows of a suite."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(embedded_root, folder / "datasets")
    foreign.write_robomimic(folder / "lift.hdf5")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "benchmarks/results").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/suites.py", folder / "benchmarks")
    shutil.copytree(ROOT / "benchmarks/results/wsrl", folder / "benchmarks/results/wsrl")
    recipe = EMBEDDED["pointmaze-pixels"]
    EMBEDDED["pointmaze-pixels"] = dataclasses.replace(recipe, steps=200, image_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setitem(os.environ, "MINARI_DATASETS_PATH", str(folder / "datasets"))
        yield (sandbox := Sandbox(folder))
        for process in sandbox.processes:
            process.kill()
            process.wait()
    EMBEDDED["pointmaze-pixels"] = recipe


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Forget the modules that a page writes, and what they register."""
    robot = gym.registry.pop("MyArm-v0", None)  # another test's
    tasks, agents, known = list(TASKS), dict(AGENTS), set(gym.registry)
    written = {"my_robot", "my_env", "my_agents", "robot_template", "arm_robot"}
    others = {name: sys.modules.pop(name) for name in written & set(sys.modules)}  # another test's
    yield
    TASKS[:] = tasks
    for now, before in ((AGENTS, agents), (gym.registry, known)):
        for name in set(now) - set(before):
            del now[name]
    for module in written & set(sys.modules):
        del sys.modules[module]
    sys.modules.update(others)
    if robot is not None:
        gym.registry["MyArm-v0"] = robot


@pytest.mark.parametrize("page", PAGES)
def test_page_works(page: str, sandbox: Sandbox, forgotten: None, request: pytest.FixtureRequest) -> None:
    """Every command and snippet of a page does what it says."""
    if page == "docs/images.md":
        request.getfixturevalue("rendering")
    sandbox.follow(page)


def options() -> set[str]:
    """Return every option that there is."""
    found = {"--trust", "--name", "--runs", "--preset", "--help", "--no-record"}

    def fields(config: Any, prefix: str) -> None:
        for field in dataclasses.fields(config):
            found.add(f"--{prefix}{field.name}".replace("_", "-"))
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                fields(value, f"{prefix}{field.name}.")

    fields(session.RunConfig(agent="bc", config=None, dataset=("a",)), "")
    for kind in AGENTS.values():
        fields(kind.preset("other", "small").config, "config.")
    for item in cli.COMMANDS.values():
        functions: list[Any] = [item] if callable(item) else list(item.values())
        for function in functions:
            found |= {f"--{param.replace('_', '-')}" for param in cli.arguments_of(function)}
    return found


def test_named_options_exist() -> None:
    """Every option that a page names is one, or begins some."""
    known = options() | {"--against", "--smoke", "--config.FIELD", "--config.NAME", "--loop.NAME", "--task.NAME"}
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)):
            named = re.findall(r"(?<!\S)(--[\w.-]+)", span)
            assert set(named) <= known, f"{page}: {set(named) - known}"


def test_named_files_exist() -> None:
    """Every link to a file of the repository leads to one."""
    for page in [*PAGES, "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#\s:]+)(?:#[\w-]*)?\)", (ROOT / page).read_text()):
            assert target.startswith("generated/") or ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def rows_of(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    part = text[text.index(heading) :].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_readme_agents() -> None:
    """README has at most 150 lines; its table has every agent, with an idea of at most eight words."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    rows = rows_of(text, "## Agents")
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[0])) == sorted(AGENTS)
    assert all(len(row[1].split()) <= 8 for row in rows)
    assert f"**{len(AGENTS)} agents**" in text


def test_readme_figures_committed() -> None:
    """Every row of README's results is a row of the report that its command writes."""
    rows = rows_of((ROOT / "README.md").read_text(), "## Results")
    assert len(rows) == 10
    for dataset, method, before, after, command in rows:
        words = shlex.split(command.strip("`"))
        assert words[:3] == ["o2o", "bench", "run"] and words[4:] == ["--agents", method.strip("`")]
        report = (ROOT / "benchmarks/results" / words[3] / "README.md").read_text().splitlines()
        found = [line for line in report if line.startswith(f"| {dataset} | ") and f" | {words[5]} | " in line]
        assert any(f" | {before} | " in line and line.endswith(f" | {after} |") for line in found), command


def test_short_sentences() -> None:
    """No sentence of a page is long: 35 words at most, and 25 in nineteen of twenty."""
    lengths = []
    for page in PAGES:
        text = re.sub(r"(?s)```.*?```", "", (ROOT / page).read_text())
        text = re.sub(r"(?m)^ *[|#].*?$|\]\([^)]*\)", "", text)
        for sentence in re.split(r"(?<=[.?!:;])\s+|\n\s*\n|\n- ", text):
            lengths.append(len(sentence.split()))
            assert lengths[-1] <= 35, f"{page}: {' '.join(sentence.split())}"
    assert sum(length <= 25 for length in lengths) >= 0.95 * len(lengths)


def test_docs_build(tmp_path: Path) -> None:
    """`make docs` has no warning: no link that leads nowhere, no docstring that cannot be read."""
    if any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo")):
        pytest.skip("Sphinx is not installed; pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "dummy", "docs", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_sweep_example(embedded: str, tmp_path: Path) -> None:
    """The sweep is read as `o2o sweep` reads it, its settings exist, and its page has the same one in TOML."""
    from o2o.report.sweep import load_sweep

    sweep = load_sweep(ROOT / "examples/sweep.py")
    (tmp_path / "sweep.toml").write_text(re.findall(r"(?s)```text\n(.*?)```", (ROOT / "docs/grids.md").read_text())[0])
    assert load_sweep(tmp_path / "sweep.toml") == sweep
    cells = sweep.suite().cells()
    assert len(cells) == 6 and len({session.cell_run(cell, tmp_path).config.expectile for cell in cells}) == 6


def test_suite_example() -> None:
    """The suite of one's own is read as `o2o bench` reads it, and its settings exist."""
    from o2o.report.suite import load_suite

    suite = load_suite(str(ROOT / "examples/my_suite.py"))
    assert [variant.label for variant in suite.variants] == ["bc", "iql", "iql_30"]
    for variant in suite.variants:
        session.with_fields(AGENTS[variant.agent].preset("other", "small").config, variant.overrides)


def test_generated_pages() -> None:
    """Generated references have every command, setting and agent, with ranges from the annotations."""
    pytest.importorskip("sphinx")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generate  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    generate.generate()
    out = ROOT / "docs/generated"
    reference = (out / "cli.md").read_text()
    assert all(f"## {name}\n" in reference for name, _ in generate.commands())
    assert "| `--episodes` | int, at least 1 | `50` | Episodes per seed. |" in reference
    settings = (out / "settings.md").read_text()
    assert "| `holdout` | float, at least 0, below 1 | `0.1` | Share of the episodes" in settings
    for kind in (session.RunConfig, cli.RunConfig, type(AGENTS["iql"].preset("other", "small").config.online)):
        assert all(f"| `{field.name}` | " in settings for field in dataclasses.fields(kind))
    pages = {path.stem: path.read_text() for path in (out / "agents").glob("*.md")}
    assert all(any(f"## Settings of `{name}`" in text for text in pages.values()) for name in AGENTS)
    assert "`sac` | 3" not in pages["sac"], "the suite's method `sac` is the agent wsrl"
    assert "| `beta` | float, at least 0 | `3.0` |" in pages["iql"]
