"""Pictures of runs: what is drawn from which rows, and what is said when there is nothing to draw."""

import json
from pathlib import Path

import matplotlib.image
import pytest

from o2o import cli
from o2o.errors import ConfigError, RunError
from o2o.report.plots import panels, plot_curves, plot_runs, pool, read_rows
from o2o.report.stats import aggregate, curve


def rows(phases=("offline", "warmup", "online"), seeds=2):
    places = {"offline": [(0, 0), (0, 1000)], "warmup": [(50, 1000)], "online": [(200, 1600), (400, 2400)]}
    return [
        {"phase": phase, "env_steps": e, "gradient_steps": g, "seed": s, "return": float(e + g + s), "success": None}
        for phase in phases
        for e, g in places[phase]
        for s in range(seeds)
    ]


def write_run(folder: Path, agent="wsrl", seed=0, settings=None, **kwargs) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"agent": agent, "seed": seed, **(settings or {})}))
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(**kwargs)))
    return folder


def test_runs_become_labelled_curves(tmp_path):
    """Runs become labelled curves and a picture."""
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b"), write_run(tmp_path / "c", "rlpd", phases=("online",))]
    out = tmp_path / "pictures" / "curve.png"
    plot_runs(runs, out, "return", "mean")
    curves = panels(runs, "return", "mean")[0].curves
    assert list(curves) == ["wsrl: a", "wsrl: b", "rlpd"], "agents that appear twice are told apart by their run"
    assert curves["rlpd"].offline.steps.size == 0
    assert curves["wsrl: a"].online.centre.tolist() == [1000.5, 1050.5, 1800.5, 2800.5]
    picture = matplotlib.image.imread(out)
    assert picture.shape[:2] == (660, 1350) and picture.std() > 0.05


def test_unknown_statistic_refused(tmp_path):
    """An unknown statistic is refused before anything is read."""
    with pytest.raises(ConfigError, match="unknown statistic 'median'; expected one of mean, iqm"):
        plot_runs([tmp_path / "none"], tmp_path / "p.png", "return", "median")


def test_seeds_are_pooled(tmp_path):
    """Runs that differ in their seeds only are pooled."""
    versions = [{"versions": {"machine": name}, "batch_size": 8} for name in "xyz"]
    runs = [write_run(tmp_path / f"s{i}", seed=i, seeds=1, settings=versions[i]) for i in range(3)]
    for run, offset in zip(runs, (0.0, 30.0, 60.0), strict=True):
        shifted = [{**row, "return": row["return"] + offset} for row in read_rows(run / "episodes.jsonl")]
        (run / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shifted))
    curves = panels(runs, "return", "mean")[0].curves
    assert list(curves) == ["wsrl"] and curves["wsrl"].seeds == 3
    assert curves["wsrl"].offline.centre.tolist() == [30.0, 1030.0]
    assert curves["wsrl"].offline.low[0] == 0.0 and curves["wsrl"].offline.high[0] == 60.0
    other = write_run(tmp_path / "other", seed=3, seeds=1, settings={"batch_size": 9})
    again = write_run(tmp_path / "again", seed=0, seeds=1, settings=versions[0])
    curves = panels([*runs, other, again], "return")[0].curves
    drawn = {label: item.seeds for label, item in curves.items()}
    assert drawn == {"wsrl: s0 and 2 more": 3, "wsrl: other": 1, "wsrl: again": 1}


def test_pooled_rows_numbering(tmp_path):
    """Pooled rows have one number per run and member."""
    runs = [write_run(tmp_path / "a", seeds=2), write_run(tmp_path / "b", seeds=3), write_run(tmp_path / "c", seeds=1)]
    last = aggregate(pool(runs))[-1]
    assert last.scores == {0: 2800.0, 1: 2801.0, 2: 2800.0, 3: 2801.0, 4: 2802.0, 5: 2800.0}
    assert {row["seed"] for row in read_rows(runs[1] / "episodes.jsonl")} == {0, 1, 2}, "in the files as it was"


@pytest.mark.parametrize(("out", "why"), [("x.txt", "has no known suffix"), ("file/x.png", "cannot be written")])
def test_unwritable_picture(out, why, tmp_path, capsys):
    """A picture that cannot be written is an error of one line."""
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit) as ended:
        cli.main(["plot", str(write_run(tmp_path / "a")), "--out", str(tmp_path / out)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and why in error and error.count("\n") == 1


@pytest.mark.parametrize("phases", [("offline",), ("online",)])
def test_single_phase_drawn(phases, tmp_path):
    """One phase alone can be drawn."""
    only = curve(rows(phases=phases))
    assert only is not None
    plot_curves({"bc": only}, tmp_path / "p.png", title="task", reference=("dataset mean", 900.0))
    assert matplotlib.image.imread(tmp_path / "p.png").std() > 0.02


def test_nothing_to_draw(tmp_path):
    """Nothing to draw is an error."""
    run = write_run(tmp_path / "a")
    with pytest.raises(RunError, match="no evaluation with metric 'success'"):
        plot_runs([run], tmp_path / "p.png", "success")
    with pytest.raises(RunError, match="expected a run folder"):
        plot_runs([tmp_path / "nowhere"], tmp_path / "p.png")


def test_cut_off_row_left_out(tmp_path):
    """A row cut off by a kill is left out."""
    path = tmp_path / "episodes.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(RunError, match="line 2: not JSON"):
        read_rows(path)
