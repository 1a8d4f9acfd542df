"""Where numbers go: rows on disk, event files where TensorBoard is installed, one clear line where it is not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from o2o import cli
from o2o.errors import ConfigError
from o2o.log import JsonLines, make_loggers

ROWS: list[dict[str, Any]] = [
    {"phase": "offline", "env_steps": 0, "gradient_steps": 500, "time_s": 1.0, "seed": 0, "critic/loss": 0.5},
    {"phase": "online", "env_steps": 40, "gradient_steps": 540, "time_s": 2.0, "seed": 1, "train/return": 3.0},
]


def test_rows_are_flushed_and_those_behind_a_checkpoint_forgotten(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "rows.jsonl")
    rows.write({"a": 1.5})
    length = rows.offset()
    rows.write({"a": float("nan"), "b": float("inf")})
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[1]) == {"a": None, "b": None}
    rows.truncate(length)
    rows.write({"a": 2})
    rows.close()
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [{"a": 1.5}, {"a": 2}]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_says_what_to_install(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"logger '{name}' needs {module}: pip install 'o2o\[log\]'"):
        make_loggers((name,), tmp_path, {})


def test_an_unknown_logger_is_refused_before_the_run_exists(
    embedded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "bc", "--dataset", embedded, "--preset", "small", "--runs", str(tmp_path), "--name", "run"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--loggers", "tensorbord"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "no logger 'tensorbord'; did you mean 'tensorboard'?" in error
    assert not (tmp_path / "run").exists()


def test_wandb_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wandb:
        @staticmethod
        def init(**_: Any) -> None:
            raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login")

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    with pytest.raises(ConfigError, match="logger 'wandb' cannot start .*no-tty.*WANDB_MODE=offline") as caught:
        make_loggers(("wandb",), tmp_path, {})
    assert "\n" not in str(caught.value)


def test_wandb_gets_every_number_under_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []

    class Run:
        log, finish = staticmethod(logged.append), staticmethod(lambda: logged.append({}))

    class Wandb:
        init = staticmethod(lambda **_: Run())

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    (logger,) = make_loggers(("wandb",), tmp_path, {})
    for row in ROWS:
        logger.metrics(row)
    logger.close()
    assert logged == [
        {"seed0/critic/loss": 0.5, "env_steps": 0, "gradient_steps": 500},
        {"seed1/train/return": 3.0, "env_steps": 40, "gradient_steps": 540},
        {},
    ]


def test_tensorboard_writes_an_event_file_per_seed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed; pip install 'o2o[log]'")
    (logger,) = make_loggers(("tensorboard",), tmp_path, {})
    for row in ROWS:
        logger.metrics(row)
    logger.close()
    first, second = ((tmp_path / "tensorboard" / f"seed{seed}").glob("events.out.tfevents.*") for seed in (0, 1))
    texts = [path.read_bytes() for path in (*first, *second)]
    assert len(texts) == 2
    assert b"offline/critic/loss" in texts[0] and b"online/train/return" in texts[1]
    assert b"time_s" not in texts[0] + texts[1]
