"""From a rendered dataset to an agent fine-tuned on images, killed and resumed; observations on device and host."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from o2o.config import LoopConfig
from o2o.errors import ConfigError, EnvironmentMismatchError
from o2o.nn.encoders import EncoderConfig
from o2o.replay.host import HostReplay
from o2o.report.plots import read_rows
from o2o.runs import session
from o2o.runs.folder import read_status

TINY: dict[str, Any] = {
    "batch_size": 6,
    "base_width": 8,
    "base_blocks": 1,
    "n_edits": 1,
    "n_samples": 2,
    "edit_hidden_dims": (8,),
    "critic_hidden_dims": (8,),
    "num_critics": 2,
    "encoder": EncoderConfig(kind="conv", conv_features=(4, 4), conv_strides=(4, 2), latent_dim=4),
    "online.utd_ratio": 1,
    "online.random_steps": 6,
}


def pixel_run(dataset: str, **loop: Any) -> session.RunConfig:
    run = session.preset_run("expo", dataset, "small")
    every = {"eval_every": 1_000, "eval_episodes": 1, "log_every": 8, "checkpoint_every": 12, "updates_per_dispatch": 4}
    return dataclasses.replace(
        run,
        config=session.with_fields(run.config, TINY.items()),
        loop=LoopConfig(**{**every, **loop}),
        offline_steps=8,
        online_steps=24,
    )


def numbers(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "time_s"} for row in read_rows(path / "metrics.jsonl")]


def agent_of(path: Path) -> tuple[list[np.ndarray], Any]:
    _, trainer = session.open_run(path)
    assert trainer.counters.phase == "online"
    found, replay = jax.tree.leaves(trainer.agent), trainer.replay
    trainer.close()
    data = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.asarray(data(leaf)) for leaf in found], replay


def test_pixel_run_end_to_end(pixels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on images is pre-trained, fine-tuned, killed, resumed and evaluated."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert session.train(pixel_run(pixels), whole)
    listen = session.Session._metrics

    def stop_at_16(self: session.Session, row: dict[str, Any]) -> None:
        listen(self, row)
        if row["phase"] == "online" and row["env_steps"] == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_metrics", stop_at_16)
        assert not session.train(pixel_run(pixels, device_bytes=0), cut)
    assert session.resume(cut) and read_status(cut) == "finished"
    (left, programs), (right, others) = agent_of(cut), agent_of(whole)
    assert isinstance(programs, HostReplay) and not isinstance(others, HostReplay)
    assert (cut / "replay" / "observations.free.bin").stat().st_size > 0 and not (whole / "replay").exists()
    for one, two in zip(left, right, strict=True):  # the same draws, in two compiled programs
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    one, two = numbers(cut), numbers(whole)
    assert [row.keys() for row in one] == [row.keys() for row in two]
    learnt = [row for row in two if "critic/loss" in row]
    assert learnt and all(np.isfinite(row["critic/loss"]) and row["critic/loss"] > 0 for row in learnt)
    rows = session.evaluate_run(cut, episodes=1)
    assert len(rows) == 1 and rows[0]["length"] > 0


def test_misfit_refused(pixels: str, tmp_path: Path) -> None:
    """What does not fit is reported before any step."""
    run = pixel_run(pixels)
    with pytest.raises(ConfigError, match="has no camera 'wrist'; it has free"):
        session.train(dataclasses.replace(run, cameras=("wrist",)), tmp_path / "unknown")
    with pytest.raises(EnvironmentMismatchError, match="32x32x3 pixels in the dataset and 64x64x3"):
        session.train(dataclasses.replace(run, cameras=("free",)), tmp_path / "size")
    with pytest.raises(EnvironmentMismatchError, match="dataset has camera 'free', the environment cannot render any"):
        session.train(dataclasses.replace(run, env="MountainCarContinuous-v0"), tmp_path / "other")
    assert not list(tmp_path.iterdir())
