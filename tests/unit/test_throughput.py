"""The throughput benchmark's arithmetic: what is merged, which ratio is said, what words select, what is counted."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # its scripts import each other by name

import layouts
import parts
import startup
import throughput
import throughput_agents
import throughput_peers
from peers import Contender, rows_of
from products import label
from throughput_machine import Span, alone, flops_of, kinds_of, measure, products, program_flops
from throughput_peers import CASES, PeersError, peers_python
from throughput_report import SQUARES, Contest, Results, Row, contest_lines, markdown, merged, number, ratios

from o2o.replay.row_store import begin_reading

ROW = Row(
    "cpu", "iql", "pen", 1, "offline", updates=[90.0, 100.0, 130.0], flops=2e6, matmul={"small": 1e9, "large": 4e8}
)
LOOP = Row("cpu", "sac", "cheetah", 2, "utd1", utd=1, steps=[200.0], updates=[500.0],
           parts={"environment": 2.0, "transfer": 0.5, "update": 4.0})  # fmt: skip


def contests(case: str, *rates: tuple[str, str, list[float]]) -> list[Contest]:
    return [Contest("cpu", case, who, form, f"{who} 1", each) for who, form, each in rates]


def test_a_new_row_replaces_its_own_form_on_its_own_device_only() -> None:
    others = [dataclasses.replace(ROW, **change) for change in ({"seeds": 5}, {"form": "utd1"}, {"device": "gpu"})]
    again = dataclasses.replace(ROW, updates=[1.0])
    assert merged([ROW, *others], [again]) == [*others, again]
    assert merged([], [ROW]) == [ROW] and merged([ROW], []) == [ROW]


def test_a_case_of_the_comparison_is_replaced_as_a_whole() -> None:
    old = [
        *contests("iql", ("ours", "as run", [1.0]), ("d3rlpy", "as run", [2.0])),
        *contests("cql", ("ours", "x", [])),
    ]
    new = contests("iql", ("ours", "as run", [3.0]))
    assert merged(old, new) == [old[2], *new]


def test_the_ratio_is_the_median_of_the_rounds_not_of_the_rates() -> None:
    assert ratios([10.0, 40.0, 90.0], [10.0, 20.0, 10.0]) == (2.0, 1.0, 9.0)
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_share_of_the_matmul_rate_and_what_no_part_of_a_step_explains() -> None:
    assert ROW.flops_per_second == 2e8
    assert ROW.share("small") == pytest.approx(0.2) and ROW.share("large") == pytest.approx(0.5)
    assert LOOP.step_milliseconds == pytest.approx(10.0) and LOOP.rest == pytest.approx(3.5)
    assert ROW.rest is None and LOOP.share("small") is None
    assert ROW.machine == "0.400" and LOOP.machine == ""
    assert dataclasses.replace(LOOP, parts={"environment": 2.0}).rest is None


def test_committed_rows_agree_with_one_another() -> None:
    flops: dict[tuple[str, str, str], set[int]] = {}
    for each in Results.load(throughput.RESULTS).rows:
        if each.flops:
            flops.setdefault((each.agent, each.shape, each.form), set()).add(round(each.flops))
        whole, played = each.step_milliseconds, each.parts.get("environment")
        assert not whole or not played or played < 2 * whole, f"{each.key}: a part is longer than the step"
    assert len(flops) > 100
    assert not {key: found for key, found in flops.items() if len(found) > 1}, "one seed's update has one count"


def test_tables_say_ratio_wanted_and_missing() -> None:
    found = contests("iql", ("ours", "as run", [300.0, 400.0, 500.0]), ("d3rlpy", "as run", [100.0, 100.0, 250.0]))
    found.append(Contest("cpu", "iql", "sbx", "as run", "", [], "has no IQL"))
    lines = contest_lines(found, CASES)
    other = next(line for line in lines if line.startswith("| d3rlpy 1"))
    assert [cell.strip() for cell in other.split("|")][3:8] == ["100", "100 - 250", "3.00", "2.00 - 4.00", "3.18"]
    assert "- SBX: has no IQL." in lines
    bounds = (("ours", "products alone", [450.0, 440.0, 500.0]), ("ours", "large products", [600.0, 400.0, 500.0]))
    bounded = contest_lines([*found, *contests("iql", *bounds)], CASES)
    assert other in bounded
    assert "- Products alone / d3rlpy: 4.40 (2.00 - 4.50), 3.18 wanted of the whole." in bounded
    assert "- Large products / d3rlpy: 4.00 (2.00 - 6.00), 3.18 wanted of the whole." in bounded


def test_results_are_written_read_and_drawn(tmp_path: Path) -> None:
    about = {"device": "cpu", "platform": "cpu", "jax": "1", "python": "3", "xla_flags": "--fast"}
    found = contests("iql", ("ours", "as run", [4.0]), ("d3rlpy", "as run", [2.0]))
    Results({"cpu": about}, [ROW, LOOP], found).save(tmp_path, CASES)
    again = Results.load(tmp_path)
    assert again.rows == [ROW, LOOP] and again.contests == found
    text = (tmp_path / "README.md").read_text()
    assert text == markdown(again, CASES) and (tmp_path / "throughput-cpu.png").stat().st_size > 1_000
    cells = next(line for line in text.splitlines() if line.startswith("| iql | offline"))
    assert [cell.strip() for cell in cells.split("|")][4:6] == ["100", "90.0 - 130"] and "| 20 % | 50 % |" in cells
    assert "| sac | utd1 | 2 | 200 | 200 - 200 | 10.0 | 2.00 | 0.500 | 4.00 | 3.50 |" in text and "`--fast`" in text
    assert "1.00 GFLOP/s at 256, 0.400 at 2048" in text
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [{"family": "adroit"}]}))
    assert Results.load(tmp_path) == Results()


def test_devices_of_one_platform_have_pictures_of_their_own(tmp_path: Path) -> None:
    about = {"platform": "cpu", "jax": "1", "python": "3"}
    machines = {name: {"device": name, **about} for name in ("AMD EPYC, 2 cores", "ARM, 8 cores")}
    machines["H100"] = {"device": "H100", **about, "platform": "gpu"}
    rows = [dataclasses.replace(ROW, device=name) for name in machines]
    Results(machines, rows).save(tmp_path, CASES)
    names = ["throughput-cpu.png", "throughput-cpu-arm-8-cores.png", "throughput-gpu.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(names)
    sections = (tmp_path / "README.md").read_text().split("\n## ")[1:]
    assert [name in section for name, section in zip(names, sections, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (1234.5, "1 234"), (22.26, "22.3"), (1.005e-1, "0.101"), (-4.01, "-4.01")],
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_words_select_alternatives_of_one_kind_and_all_kinds_together() -> None:
    cells = throughput.chosen_cells(["iql", "cql", "pen", "1seed", "utd4", "offline"], False)
    assert [(c.agent, c.shape, c.seeds, c.forms) for c in cells] == [
        (name, "pen", 1, ("offline", "utd4")) for name in ("iql", "cql")
    ]
    assert {c.agent for c in throughput.chosen_cells(["pixels"], False)} == {"expo", "residual"}
    assert {c.agent for c in throughput.chosen_cells(["online"], False)} >= {"ppo", "uni_o4", "bc"}
    assert throughput.chosen_cells(["sbx", "iql"], False) == [] and throughput.chosen_cells(["comparison"], False) == []
    assert throughput.chosen_cases(["sbx", "loop"]) == [("loop", ("sbx",))] and throughput.chosen_cases(["pen"]) == []
    assert len(throughput.chosen_cases(["comparison"])) == len(throughput.chosen_cases([])) == len(CASES)
    whole = throughput.chosen_cells([], False)
    assert whole == throughput.chosen_cells(["agents"], False) and len(
        {(c.agent, c.shape, c.seeds) for c in whole}
    ) == len(whole)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--quik"], "did you mean --quick"),
        (["iqll"], "did you mean iql"),
        (["sbx"], "without --peers"),
        (["iql", "pixels"], "fewer"),
    ],
)
def test_what_cannot_be_understood_is_said_in_one_line(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput.main(args) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_flops_count_every_round_of_a_scan() -> None:
    x, y = jnp.zeros((3, 4)), jnp.zeros((4, 5))

    def rounds(x: jax.Array, y: jax.Array) -> Any:
        step = lambda carry, _: (carry, jax.jit(jnp.dot)(carry, y))  # noqa: E731
        out = jax.lax.scan(step, x, None, length=7)[1]
        return jax.lax.cond(x[0, 0] > 0, lambda: out[0], lambda: jnp.tanh(x) @ y)

    one = 2.0 * 3 * 4 * 5
    found = products(jax.make_jaxpr(rounds)(x, y).jaxpr)
    assert [times for _, times in found] == [7, 1] and flops_of(found) == 8 * one
    ours, theirs = program_flops(jax.jit(lambda a, b: jnp.einsum("ij,jk->ik", a, b)).trace(x, y))
    assert ours == one and (theirs is None or theirs == pytest.approx(one, rel=0.2))
    seldom = jax.jit(lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b @ b.T @ b, lambda: a @ b)).trace(x, y)
    assert program_flops(seldom)[0] == one + 2 * 2.0 * 3 * 4 * 5
    assert program_flops(seldom, period=4)[0] == one + 2 * 2.0 * 3 * 4 * 5 / 4
    images, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 6))

    def convolve(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(a, b, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops_of(products(jax.make_jaxpr(convolve)(images, kernel).jaxpr)) == 2.0 * (2 * 4 * 4 * 6) * (3 * 3 * 3)


def test_measuring_counts_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, done = [0.0], []

    def run(count: int) -> None:
        done.append(count)
        clock[0] += 0.25 * count

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert measure(run, Span(repeats=3, seconds=1.0, limit=100.0)) == [4.0, 4.0, 4.0] and done[-3:] == [4, 4, 4]
    assert measure(run, Span(repeats=3, seconds=1.0, limit=0.1)) == [4.0]
    assert len(measure(run, Span(repeats=9, seconds=1.0, limit=3.0))) == 3
    done.clear()
    assert measure(run, Span(repeats=3, seconds=1.0, limit=4.0), known=5.0) == [0.2] and not done
    contender = Contender("x", {"as run": (run, "")}, units=20)
    assert contender.measure("as run", 2.0) == pytest.approx(80.0) and done[-1] == 8


def test_large_products_are_credited_with_the_flops_that_they_make(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, done = [0.0], []

    def run(count: int) -> None:
        done.append(count)
        clock[0] += 0.125 * count

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(throughput_agents, "squares", lambda size: run)
    for rows, share in ((16, 1 / 16), (1024, 4.0)):  # an update of fewer FLOPs than one product, and of more
        traced = jax.jit(jnp.dot).trace(jnp.zeros((rows, 32)), jnp.zeros((32, 32)))
        adapter: Any = SimpleNamespace(traced=lambda utd, traced=traced: (traced, utd))
        forms, worth = throughput_agents.bounds(adapter, 20, 2 * 32)
        assert worth == 1 / share
        contender = Contender("x", forms, units=20, worth={SQUARES: worth})
        contender.measure(SQUARES, 0.0)  # as `serve` makes it ready
        rates, lengths = [], []
        for _ in range(3):
            rates.append(contender.measure(SQUARES, 2.0))
            lengths.append(done[-1])
        assert lengths == [16, 16, 16], "two seconds, the first round too"
        assert rates == [pytest.approx(8.0 / share * 20)] * 3


def test_synthetic_rows_are_those_of_the_case() -> None:
    rows = rows_of(CASES["iql"].settings(quick=True))
    assert rows["observations"].shape == (2_000, 45) and rows["actions"].shape == (2_000, 24)
    assert rows["ends"].sum() == 2 and abs(rows["actions"]).max() <= 1.0
    assert CASES["loop"].settings(quick=False)["capacity"] == 1_000_000


def test_a_machine_without_osmesa_is_measured_without_it() -> None:
    code = (
        "import ctypes.util, os, sys\nctypes.util.find_library = lambda name: None\nsys.path.insert(0, sys.argv[1])\n"
        "import throughput_adapter\nprint(os.environ.get('MUJOCO_GL'), throughput_adapter.SHAPES['pen'][1])\n"
    )
    unset = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    command = [sys.executable, "-c", code, str(throughput_peers.HERE)]
    result = subprocess.run(command, env=unset, capture_output=True, text=True, timeout=120)
    assert result.stdout == "None AdroitHandPen-v1\n", result.stderr


def test_a_layouts_ratio_is_the_median_of_the_rounds() -> None:
    text = layouts.report(
        {"machine": "a machine", "iql": {layouts.SHIPPED: [10.0, 20.0, 40.0], "both": [5.0, 20.0, 36.0]}}
    )
    assert "| both | 20 | 0.90 [0.50, 1.00] |" in text and "| as shipped | 20 | 1 |" in text


def test_the_report_of_start_up_says_what_was_measured_and_nothing_else() -> None:
    rows = {
        "machine": "a machine",
        "import": [{"seconds": s, "process": 2 * s, "backends": 0} for s in (1.0, 3.0, 2.0)],
    }
    text = startup.report(rows)
    assert "2 (1 - 3) s, 0 JAX back ends" in text and "4 (2 - 6) s from the start" in text and "##" not in text
    rates = {"device": [10.0, 20.0], "files": [9.0, 20.0], "cold": [5.0, 5.0]}
    images = {"rates": rates, "rows": 7, "megabytes": 3, "resident": [0.0, 0.021]}
    text = startup.report({"machine": "a machine", "images": [images]})
    assert "| in files | 14.5 (9 - 20) | 0.95 (0.9 - 1) |" in text and "0.375 (0.25 - 0.5)" in text
    assert "told to drop from memory (up to 2.1% of their pages stayed) |" in text
    load = {"load": "first", "seconds": 2.0, **dict.fromkeys(("arrays", "kept", "peak"), 1.0)}
    assert "steps, measured once\n" in startup.report({"machine": "a machine", "data": [load]})


def test_files_that_are_mapped_are_dropped_from_memory(tmp_path: Path) -> None:
    mapped = [np.memmap(tmp_path / f"{i}.bin", np.uint8, "w+", shape=(5_000_001,)) for i in range(2)]
    for array in mapped:
        array[:] = 1
        array.flush()
    assert startup.resident(mapped) > 0.5
    (tmp_path / "probe").write_bytes(bytes(5_000_001))
    with (tmp_path / "probe").open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if startup.resident([np.memmap(tmp_path / "probe", np.uint8, "r")]) > 0.05:
        pytest.skip("this file system drops nothing that is not mapped either, as one in memory")
    startup.forget(mapped)
    assert startup.resident(mapped) < 0.05
    assert mapped[1].sum() == 5_000_001 and startup.resident(mapped) > 0.45, "read again from the disk"


def test_rows_in_files_are_asked_for_all_at_once_and_nothing_else_is(tmp_path: Path) -> None:
    shape = (500, 2, 50, 50, 3)  # rows of 7500 bytes begin anywhere in a page
    mapped = np.memmap(tmp_path / "rows.bin", np.uint8, "w+", shape=shape)
    mapped[:] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mapped.flush()
    startup.forget([mapped])
    if startup.resident([mapped]) > 0.05:
        pytest.skip("this file system drops nothing")
    rows, seeds = np.asarray([3, 150, 3, 499]), np.asarray([1, 0, 1, 1])
    begin_reading(np.asarray(mapped)[:], rows, seeds)  # a view of it, as a dataset has
    pages, until = startup.resident([mapped]) * mapped.nbytes / 4096, time.monotonic() + 10
    while pages < 7 and time.monotonic() < until:
        time.sleep(0.01)
        pages = startup.resident([mapped]) * mapped.nbytes / 4096
    assert 7 <= round(pages) <= 12, "three rows of two or three pages"
    assert int(mapped[3, 1].sum()) == int(np.random.default_rng(0).integers(0, 256, shape, np.uint8)[3, 1].sum())


def test_what_no_script_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert layouts.main(["sac"]) == 2 and "cases: sac-utd1" in capsys.readouterr().err
    assert startup.main(["imports"]) == 2 and "parts: import" in capsys.readouterr().err


def test_a_table_of_parts_is_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "HERE", tmp_path)
    monkeypatch.setattr(parts, "prepare_process", lambda: None)
    monkeypatch.setattr(parts, "machine_here", lambda: {"device": "this one"})
    folder, two = tmp_path / "results/things", {"a": lambda: 1, "b": lambda: 2}
    for device, kept in (("another", {}), ("this one", {"a": 0})):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.json").write_text(json.dumps({"machine": device, "a": 0}))
        assert parts.measure_parts(["b"], two, str, "things") == 0
        assert json.loads((folder / "rows.json").read_text()) == {"machine": "this one", **kept, "b": 2}


def test_a_folder_with_other_things_is_not_made_the_peers_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(throughput_peers, "FOLDER", tmp_path)
    with pytest.raises(PeersError, match="holds something else.*O2O_PEERS"):
        peers_python()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_kinds_of_products_are_counted_with_the_flops_of_one() -> None:
    def twice(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda z, _: (z @ y, None), x @ y, None, length=3)[0].sum() + (x.T @ x).sum()

    traced = jax.jit(twice).trace(jnp.ones((2, 5)), jnp.ones((5, 5)))
    kinds = kinds_of(traced)
    assert sorted(kinds.values()) == [(1, 100.0), (4, 100.0)]
    assert program_flops(traced)[0] == sum(count * flops for count, flops in kinds.values())


def test_a_weights_gradient_is_named_as_xla_makes_it() -> None:
    def weigh(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.square(x @ kernel).sum()

    x, kernel = jnp.ones((2, 8, 3)), jnp.ones((2, 3, 5))
    compiled = jax.jit(jax.grad(weigh, argnums=1))
    kinds = kinds_of(compiled.trace(x, kernel))
    assert {label(kind): entry for kind, entry in kinds.items()} == {
        "2x8x3 . 2x3x5": (1, 480.0), "2x8x3' . 2x8x5": (1, 480.0),
    }  # fmt: skip
    dots = [line for line in compiled.lower(x, kernel).compile().as_text().splitlines() if " dot(" in line]
    assert sorted(dot.split("=")[1].split("{")[0].strip() for dot in dots) == ["f32[2,3,5]", "f32[2,8,5]"]
    both = jax.jit(lambda x, y: ((z := x @ y).T, z)).trace(jnp.ones((4, 3)), jnp.ones((3, 5)))
    assert [label(kind) for kind in kinds_of(both)] == ["4x3 . 3x5"]  # read as it is, too


def test_a_product_alone_is_made_as_often_as_asked_and_named_by_its_operands() -> None:
    plain, turned = (((2,), (1,)), ((0,), (0,))), (((1,), (2,)), ((0,), (0,)))
    assert label((((2, 3, 4), (2, 4, 5)), plain)) == "2x3x4 . 2x4x5"
    assert label((((2, 4, 3), (2, 5, 4)), turned)) == "2x4x3' . 2x5x4'"
    assert label((((3, 4), (5, 4)), (((1,), (1,)), ((), ())))) == "3x4 . 5x4'"
    run: Any = alone(((2, 3, 4), (2, 4, 5)), plain)
    first, second = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 4), (2, 4, 5)]))
    once = float((first @ second)[-1, -1, -1])
    for count in (1, 4):
        assert float(run(count)) == pytest.approx(count * once, rel=1e-4)
