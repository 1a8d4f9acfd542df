"""The command line as a user meets it: exit codes, one clear line for bad input, the whole way on a tiny run."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from o2o.data import datasets
from tests.helpers.command_line import TINY, run


def test_run_name_is_file(embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run name that is a file is refused."""
    (tmp_path / "one").write_text("mine")
    assert run("train", "wsrl", "--dataset", embedded, *TINY, "--runs", str(tmp_path), "--name", "one") == 2
    error = capsys.readouterr().err
    assert "one is a file, where a run needs a folder: choose another --name" in error and error.count("\n") == 1
    assert (tmp_path / "one").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "wsrll"], "did you mean 'wsrl'"),
        (["train", "wsrl"], "no --dataset"),
        (
            ["train", "wsrl", "--dataset", "o2o/embeded/pointmaze-umaze-v0"],
            "did you mean 'o2o/embedded/pointmaze-umaze-v0'",
        ),
        (["data", "describe", "no/such-v0"], "no/such-v0"),
        (["data", "make", "nothing"], "pointmaze-umaze"),
        (["data", "lst"], "did you mean 'list'"),
        (["--verison"], "Unrecognized options: --verison"),
        (["plot"], "no run folder; give one or more"),
        (["eval", "runs/absent", "--episods", "3"], "did you mean --episodes?; `o2o eval --help`"),
        (["data", "list", "--rot", "x"], "did you mean --root?; `o2o data list --help`"),
        (["bench", "run", "nothing"], "nothing"),
        (["resume", "runs/absent"], "no run folder"),
        (["resume", __file__], "test_cli.py is no run folder"),
        (["eval", __file__], "test_cli.py is no run folder"),
        (["play", __file__, "--out", "x.mp4"], "test_cli.py is no run folder"),
        (["balance", __file__], "test_cli.py is no run folder"),
        (["data", "make", "pointmaze-umaze", "--root", __file__], "test_cli.py is a file, expected a folder"),
        (["eval", "runs/absent"], "no run folder"),
        (["play", "runs/absent", "--out", "x.mp4"], "no run folder"),
        (["data", "export", "runs/absent"], "no run folder"),
        (["resume"], "Missing from o2o resume"),
        (["eval", "runs/absent", "--episodes", "many"], "--episodes: expected a whole number"),
    ],
)
def test_bad_input_one_line(args: list[str], words: str, embedded: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input is one line and exit code 2."""
    assert run(*args) == 2
    error = capsys.readouterr().err
    assert error.startswith("o2o: error: ") and error.count("\n") == 1 and words in error


def test_unknown_field_suggests_near_one(embedded: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown field is refused with the near one."""
    assert run("train", "wsrl", "--dataset", embedded, "--config.online.utd-ration", "3") == 2
    error = capsys.readouterr().err
    assert "did you mean --config.online.utd-ratio?" in error and error.count("\n") == 1


@pytest.mark.parametrize("agent", ["bc", "iql", "cql", "calql", "sac", "rlpd", "wsrl"])
def test_help_explains_every_field(agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The help explains every field with its default."""
    assert run("train", agent, "--help") == 0
    text = capsys.readouterr().out
    for option in ("--config.discount", "--config.online.utd-ratio", "--dataset", "--seeds"):
        assert option in text
    assert "0.99" in text


@pytest.mark.parametrize("args", [[], ["data"], ["bench"], ["train"], ["eval"], ["data", "export"]])
def test_help_at_every_level(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every level of the command line has its help."""
    assert run(*args, "--help") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(" ".join(["usage: o2o", *args])) and not shown.err
    words = {
        "": "fine-tune it in its environment",
        "data": "Minari dataset of the episodes",
        "train": "bc Behaviour cloning: imitates",
    }
    assert words.get(" ".join(args), "") in " ".join(shown.out.replace("│", "").split())


def test_help_needs_no_jax() -> None:
    """The help does not import JAX."""
    code = "import sys; from o2o import cli\ntry: cli.main(['--help'])\nexcept SystemExit: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_data_commands(embedded: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands `data list`, `data describe` and `data check` work."""
    assert run("data", "list") == 0
    assert "PointMaze" in capsys.readouterr().out
    assert run("data", "describe", embedded) == 0
    assert "PointMaze_UMaze-v3" in capsys.readouterr().out
    assert run("data", "check", embedded) == 0
    assert "ok" in capsys.readouterr().out


def test_description_not_markup(embedded_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a dataset says of itself is not read as markup."""
    words = "see [/bold] and [red]this[/red] :warning:"
    shutil.copytree(embedded_root, tmp_path / "data")
    (path,) = (tmp_path / "data").rglob("metadata.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "description": words}))
    assert run("data", "describe", str(path.parent.parent)) == 0
    assert f"description: {words}\n" in capsys.readouterr().out


def test_broken_dataset_listed(embedded_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken dataset is listed as such."""
    shutil.copytree(embedded_root, tmp_path / "data")
    for name, text in (("cut", '{"dataset_id": "cut'), ("other", "[1]")):
        (tmp_path / "data" / name / "data").mkdir(parents=True)
        (tmp_path / "data" / name / "data" / "metadata.json").write_text(text)
    assert run("data", "list", "--root", str(tmp_path / "data")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("broken:") == 2 and "PointMaze_UMaze-v3" in shown


def test_library_messages_printed_once(
    embedded: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line prints the library's messages once.

    Python callers get log records; the command prints each as one line and then removes its handler.
    """

    def describe(*_: object) -> dict[str, str]:
        logging.getLogger("o2o.data").warning("disk is nearly full")
        return {}

    monkeypatch.setattr(datasets, "describe", describe)
    for _ in range(2):
        assert run("data", "describe", embedded) == 0
        assert capsys.readouterr().err == "o2o: disk is nearly full\n"
    assert not logging.getLogger("o2o").handlers


def test_module_runs_as_program(embedded: str) -> None:
    """The module runs as a program."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", "o2o", "--version"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0 and re.match(r"o2o \d+\.\d+", done.stdout)
