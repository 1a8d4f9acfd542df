"""The whole way on the command line, on a tiny run."""

import re
from pathlib import Path

import pytest

from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.folder import read_status
from tests.helpers.command_line import TINY, run


def test_train_eval_plot_play(embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run is trained, evaluated, plotted and resumed; `eval` and `play` refuse what cannot be."""
    assert run("train", "wsrl", "--dataset", embedded, *TINY, "--runs", str(tmp_path), "--name", "one") == 0
    path = tmp_path / "one"
    assert read_status(path) == "finished" and (path / "curve.png").stat().st_size > 5_000
    assert {row["phase"] for row in read_rows(path / "episodes.jsonl")} == {"offline", "warmup", "online"}
    config = session.load_config(path)
    assert config.config.finetune.actor_hidden_dims == (8, 8) and config.online_steps == 40 and config.preset == "small"
    capsys.readouterr()
    assert run("eval", str(path), "--episodes", "2") == 0
    assert re.search(r"return .*\(n=1\).* 2 ", capsys.readouterr().out)
    assert run("plot", str(path), "--out", str(tmp_path / "p.png")) == 0
    assert (tmp_path / "p.png").stat().st_size > 5_000
    assert run("resume", str(path)) == 0
    assert run("resume", str(path), "--online-steps", "30") == 2
    assert "has made 40 environment steps" in capsys.readouterr().err
    assert run("resume", str(path), "--online-steps", "45") == 0
    assert read_rows(path / "episodes.jsonl")[-1]["env_steps"] == 45
    assert run("train", "wsrl", "--dataset", embedded, *TINY, "--runs", str(tmp_path), "--name", "one") == 2
    assert "exists already" in capsys.readouterr().err
    for args, words in (
        (["eval", str(path), "--checkpoint", "bset"], "no checkpoint 'bset'; give latest, best or a step"),
        (["eval", str(path), "--checkpoint", "7"], "no checkpoint 7"),
        (["eval", str(path), "--seed", "-1"], "seed is -1; expected at least 0"),
        (["play", str(path), "--seed", "-1", "--out", str(tmp_path / "play.gif")], "seed is -1; expected at least 0"),
        (["play", str(path), "--seed-index", "1", "--out", str(tmp_path / "play.gif")], "no seed of index 1"),
        (["play", str(path), "--out", str(tmp_path / "x.avi")], "has no known suffix"),
        (["data", "export", str(path)], "no recorded episode: train with --record"),
    ):
        assert run(*args) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    (path / "episodes.jsonl").write_text("")
    assert run("resume", str(path)) == 0, "a run that has nothing to draw has finished all the same"
    assert "no curve drawn: no evaluation" in capsys.readouterr().err
