"""The speed benchmarks' arithmetic and processes: what a rate is, which cases are chosen, what a report says."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # its scripts import each other by name

import peers
import throughput
from throughput import MeasureError, Meter, Worker

SCRIPT = """
import sys, time
sys.path.insert(0, {folder!r})
from throughput import Meter, serve
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a test moves it."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def work(clock: list[float], each: float, overhead: float = 0.0, first: float = 0.0) -> Callable[[int], None]:
    """Return what takes `each` seconds a time, `overhead` a call, and `first` more in its first call."""
    calls = []

    def run(count: int) -> None:
        calls.append(count)
        clock[0] += each * count + overhead + (first if len(calls) == 1 else 0.0)

    run.calls = calls  # pyright: ignore[reportFunctionMemberAccess]
    return run


def test_rate_excludes_overhead(clock: list[float]) -> None:
    """A rate leaves out the first call and every call's overhead."""
    run = work(clock, each=0.25, overhead=2.0, first=60.0)
    meter = Meter(run, overhead=2.0)
    assert meter.first == 62.25
    assert meter.measure(1.0) == pytest.approx(4.0)
    assert run.calls[-1] == 64, "eight times the overhead at least"  # pyright: ignore[reportFunctionMemberAccess]


def test_counts_and_units(clock: list[float]) -> None:
    """Counts are multiples of the step, and rates are in units."""
    run = work(clock, each=0.001)
    meter = Meter(run, step=64, unit=5)
    assert meter.measure(1.0) == pytest.approx(5000.0)
    assert all(count % 64 == 0 for count in run.calls)  # pyright: ignore[reportFunctionMemberAccess]


def test_settings_replaced_at_every_depth() -> None:
    """Settings are replaced at every depth."""

    @dataclasses.dataclass(frozen=True)
    class Inner:
        utd_ratio: int = 1
        keep: int = 7

    @dataclasses.dataclass(frozen=True)
    class Outer:
        batch_size: int = 8
        pretrain: Inner = Inner()
        online: Inner = Inner(2)

    found = throughput.with_settings(Outer(), batch_size=256, utd_ratio=20, unknown=1)
    assert found == Outer(256, Inner(20), Inner(20))


def test_patterns_choose_cases() -> None:
    """Patterns choose cases, and one that matches none is refused."""
    assert throughput.chosen(["iql/pen/1/*"], ()) == [
        f"iql/pen/1/{form}" for form in ("offline", "act", "insert", "utd1", "utd4", "utd20")
    ]
    assert throughput.chosen([], ("bc/pen/1/act",)) == ["bc/pen/1/act"]
    assert {name.split("/")[0] for name in throughput.chosen(["*/pixels/*"], ())} >= {"expo", "residual"}
    known = set(throughput.all_cases())
    assert known.issuperset(throughput.AGAINST) and known.issuperset(throughput.SMOKE)
    with pytest.raises(MeasureError, match="no case is like 'iqll/'"):
        throughput.chosen(["iql/*", "iqll/"], ())


@pytest.mark.parametrize("args", [["--quik"], ["iqll/*"], ["--against", "nowhere"]])
def test_bad_arguments_exit_code(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Bad arguments end with exit code two."""
    with pytest.raises(SystemExit) as stopped:
        throughput.main(args)
    assert stopped.value.code == 2 and args[-1] in capsys.readouterr().err


def test_tables_round_trip(tmp_path: Path) -> None:
    """Tables are written and read back."""
    rows = [{"device": "AMD, 2 cores", "case": "iql/pen/1/offline", "per_second": "12"}]
    throughput.write_table(tmp_path / "new", "rates.csv", rows, throughput.markdown_table(("case", "per_second"), rows))
    assert throughput.read_table(tmp_path / "new/rates.csv") == rows
    assert "| iql/pen/1/offline | 12 |" in (tmp_path / "new/README.md").read_text()
    assert throughput.read_table(tmp_path / "rates.csv") == []


def start(body: str) -> Worker:
    folder = str(Path(throughput.__file__).parent)
    return Worker("it", [sys.executable, "-c", SCRIPT.format(folder=folder) + body])


def test_workers_answer_in_turns() -> None:
    body = "run = lambda count: time.sleep({} * count)\nserve(lambda: {{'a': Meter(run)}}, lambda: {{'about': 1}})"
    workers = [start(body.format(each)) for each in (0.002, 0.004)]
    try:
        assert [worker.answer()["about"] for worker in workers] == [1, 1]
        fast, slow = throughput.in_turns(workers, [["a"], ["a"]], smoke=True)
        assert len(fast) == len(slow) == 2 and min(fast) > 0 and min(slow) > 0
    finally:
        for worker in workers:
            worker.close()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise SystemExit('out of luck')", "it: ended with code 1; out of luck"),
        ("def make(): raise ValueError('no such\\n agent')\nserve(make)", "it: ValueError: no such agent"),
    ],
)
def test_failed_process_says_why(body: str, said: str) -> None:
    """A process that fails says why."""
    worker = start(body)
    try:
        with pytest.raises(MeasureError, match=said):
            worker.answer()
    finally:
        worker.close()


def test_ratio_is_median_of_rounds() -> None:
    """The ratio is the median of the rounds' ratios, not the ratio of the median rates."""
    shared = {"device": "cpu", "case": "iql", "form": peers.AS_RUN, "date": "2026-11-30"}
    rows = [
        {**shared, "library": "o2o", "version": "o2o", "rates": "10 40 90"},
        {**shared, "library": "d3rlpy", "version": "d3rlpy 2", "rates": "10 20 10"},
        {**shared, "library": "o2o", "version": "o2o", "form": peers.PRODUCTS, "rates": "20 80 180"},
    ]
    lines = peers.report(rows).splitlines()
    cells = [cell.strip() for cell in next(line for line in lines if line.startswith("| d3rlpy 2")).split("|")]
    assert cells[2:6] == ["as run", "10 [10, 20]", "2.00 [1.00, 9.00]", "3.18"]
    assert any("| products alone | 80 [20, 180] | 0.50 [0.50, 0.50] |" in line for line in lines)


def test_committed_rounds_match() -> None:
    """The committed comparisons have as many rounds on every side."""
    rows = throughput.read_table(Path(throughput.HERE) / "results/throughput/comparison.csv")
    rounds: dict[str, set[int]] = {}
    for row in rows:
        if row["rates"]:
            rounds.setdefault(row["case"], set()).add(len(row["rates"].split()))
    assert set(rounds) == set(peers.CASES) and all(len(found) == 1 for found in rounds.values())


def test_committed_flops_are_unique() -> None:
    """One update has one count of operations in the committed table."""
    rows = throughput.read_table(Path(throughput.HERE) / "results/throughput/rates.csv")
    flops: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        if row["flops"]:
            flops.setdefault((row["agent"], row["shape"], row["form"]), set()).add(row["flops"])
    assert len(flops) > 100 and all(len(found) == 1 for found in flops.values())


def test_products_in_scan_and_branch() -> None:
    """The products count every round of a scan and the dearest branch."""
    x, y = jnp.zeros((3, 4)), jnp.zeros((4, 5))

    def rounds(x: jax.Array, y: jax.Array) -> Any:
        step = lambda carry, _: (carry, jax.jit(jnp.dot)(carry, y))  # noqa: E731
        out = jax.lax.scan(step, x, None, length=7)[1]
        return jax.lax.cond(x[0, 0] > 0, lambda: out[0], lambda: jnp.tanh(x) @ y)

    kinds = peers.kinds_of(jax.make_jaxpr(rounds)(x, y).jaxpr)
    assert list(kinds.values()) == [(8, 2.0 * 3 * 4 * 5)] and next(iter(kinds))[0] == ((3, 4), (4, 5))


def test_transposed_product_swaps_operands() -> None:
    """A product that is transposed afterwards is made with its operands exchanged."""
    x, y = jnp.zeros((4, 3)), jnp.zeros((3, 5))
    (kind,) = peers.kinds_of(jax.make_jaxpr(lambda a, b: (a @ b).T)(x, y).jaxpr)
    assert kind[0] == ((3, 5), (4, 3))
    (kind,) = peers.kinds_of(jax.make_jaxpr(lambda a, b: ((z := a @ b).T, z))(x, y).jaxpr)
    assert kind[0] == ((4, 3), (3, 5)), "it is read as it is, too"


def test_product_alone_count() -> None:
    """A product alone is made as often as asked."""
    run: Any = peers.alone(((2, 3, 4), (2, 4, 5)), (((2,), (1,)), ((0,), (0,))))
    first, second = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 4), (2, 4, 5)]))
    once = float((first @ second)[-1, -1, -1])
    for count in (1, 4):
        assert float(run(count)) == pytest.approx(count * once, rel=1e-4)


def test_foreign_folder_not_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of something else is never emptied."""
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    with pytest.raises(MeasureError, match="holds something else"):
        peers.peers_python()
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_peers_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other libraries are installed once."""
    folder, commands = tmp_path / "peers", []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        if "venv" in command:
            (folder / "bin").mkdir(parents=True, exist_ok=True)
            (folder / "bin" / "python").touch()
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(peers, "FOLDER", folder)
    monkeypatch.setattr(peers.subprocess, "run", run)
    assert peers.peers_python() == peers.peers_python() == folder / "bin" / "python"
    assert len(commands) == 2 and json.loads((folder / "installed.json").read_text()) == list(peers.PACKAGES)
