"""The benchmark harness: verdicts, reports, fair ratios, peers; the figures are made up."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from pathlib import Path

import pytest

from manifold.kernel.errors import NotFound
from manifold.tools.bench import harness, peers
from manifold.tools.bench.harness import Absent, Figure, Run, run_benchmarks


def figure(value: float, goal: float | None, better: str = "lower") -> Figure:
    return Figure("boot", value, goal, better, "s", {"median s": value, "of": "5"}, "a note")  # type: ignore[arg-type]


def report(run: Run, **options: bool) -> tuple[int, str]:
    out = io.StringIO()
    return run_benchmarks(["made-up"], load=lambda _name: run, out=out, **options), out.getvalue()


def absent(_quick: bool) -> list[Figure]:
    raise Absent("gcc is not here.", "Install it.")


# --- verdicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, goal, better, met",
    [
        (1.0, 1.0, "lower", True),
        (1.1, 1.0, "lower", False),
        (1.0, 1.0, "higher", True),
        (0.9, 1.0, "higher", False),
        (math.nan, 1.0, "lower", False),
        (math.nan, 1.0, "higher", False),
        (5.0, None, "lower", None),
    ],
)
def test_a_goal_is_met_at_its_value_and_nan_meets_none(
    value: float, goal: float | None, better: str, met: bool | None
) -> None:
    assert figure(value, goal, better).met is met


def test_the_report_shows_figure_goal_verdict_raw_values_and_the_machine() -> None:
    code, text = report(lambda _quick: [figure(0.5, 1.0), figure(2.0, 1.0), figure(3.0, None)])
    assert code == 0
    assert "met     boot: 0.5 s  (goal <= 1)" in text
    assert "MISSED  boot: 2 s  (goal <= 1)" in text
    assert "-       boot: 3 s\n" in text
    assert "median s 0.5, of 5" in text and "a note" in text
    machine = text.splitlines()[0]
    assert (
        f"Python {sys.version.split()[0]}" in machine and "cores" in machine and "load" in machine
    )


def test_check_fails_where_a_goal_is_missed_or_a_tool_is_absent() -> None:
    assert report(lambda _quick: [figure(0.5, 1.0)], check=True)[0] == 0
    assert report(lambda _quick: [figure(3.0, None)], check=True)[0] == 0
    assert report(lambda _quick: [figure(0.5, 1.0), figure(2.0, 1.0)], check=True)[0] == 1
    code, text = report(absent, check=True)
    assert code == 1 and "ABSENT  gcc is not here. Install it." in text
    assert report(absent)[0] == 0


def test_a_fault_of_the_benchmark_itself_is_not_an_absence() -> None:
    def broken(_quick: bool) -> list[Figure]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        report(broken)


def test_json_is_one_document_with_all_of_it() -> None:
    code, text = report(lambda _quick: [figure(2.0, 1.0)], as_json=True, check=True)
    found = json.loads(text)
    assert code == 1 and found["met"] is False
    (benchmark,) = found["benchmarks"]
    assert benchmark["name"] == "made-up" and benchmark["absent"] == ""
    (only,) = benchmark["figures"]
    assert (only["value"], only["goal"], only["met"], only["unit"]) == (2.0, 1.0, False, "s")
    assert {"cpu_model", "cores", "python", "kernel", "load_average"} == set(found["machine"])


def test_quick_reaches_the_benchmark() -> None:
    seen = []
    for quick in (False, True):
        report(lambda given: seen.append(given) or [], quick=quick)  # type: ignore[func-returns-value]
    assert seen == [False, True]


# --- the registry -----------------------------------------------------------------------------


def test_a_benchmark_is_a_file_that_defines_run(tmp_path: Path) -> None:
    (tmp_path / "idle_cost.py").write_text('"""What idling costs.\n\nMore."""\ndef run(): ...\n')
    (tmp_path / "helper.py").write_text('"""No benchmark."""\ndef runs(): ...\n')
    assert harness.names(tmp_path) == ["idle-cost"]
    assert harness.summary("idle-cost", tmp_path) == "What idling costs."
    with pytest.raises(NotFound, match=r"no benchmark 'helper'\. There are: idle-cost"):
        harness.summary("helper", tmp_path)


def test_every_benchmark_of_ours_says_what_it_shows() -> None:
    assert all(harness.summary(name) for name in harness.names())
    assert not {"harness", "peers"} & set(harness.names())


def test_an_unknown_benchmark_is_told_before_any_runs() -> None:
    with pytest.raises(NotFound, match="no benchmark 'nonsense'"):
        run_benchmarks(["nonsense"], out=io.StringIO())


# --- measuring --------------------------------------------------------------------------------


def test_two_things_are_measured_in_turns_and_the_ratio_is_of_each_round() -> None:
    order = []
    # The machine slows down tenfold for two rounds: the rounds' own ratios do not move.
    slow = iter([1.0, 1, 1, 10, 10, 10, 10, 1, 1, 1, 1, 1])

    def side(name: str, seconds: float):
        def measured() -> float:
            order.append(name)
            return seconds * next(slow)

        return measured

    found = harness.interleave(side("a", 0.3), side("b", 0.1), 5)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert found.ratio == pytest.approx(3.0)
    assert found.ratio_low == pytest.approx(0.3) and found.a == pytest.approx(0.3)
    assert found.raw("ours", "theirs")["ours s"] == found.a


def test_a_call_that_does_not_time_itself_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert harness.seconds_of(lambda: None) == 2.5


def test_the_best_of_several_is_the_least() -> None:
    seconds = iter([3.0, 1.0, 2.0])
    assert harness.best_of(lambda: next(seconds), 3) == 1.0


def test_a_percentile_is_one_of_the_samples() -> None:
    samples = [float(each) for each in range(100, 0, -1)]
    assert [harness.percentile(samples, p) for p in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert harness.percentile([7.0], 50) == 7.0


# --- peers ------------------------------------------------------------------------------------


def test_all_ways_to_sum_collatz_steps_agree_with_the_known_sums() -> None:
    assert peers.cpython_collatz(100).total == peers.seed_interpreter(100).total == 3142
    assert peers.cpython_collatz(1000).total == 59_542
    assert peers.interpret(peers.SEED_COLLATZ, 27) == [111.0]


def test_the_c_program_agrees_and_is_removed_with_its_owner() -> None:
    try:
        compiled = peers.gcc_collatz()
    except Absent as reason:
        pytest.skip(str(reason))
    folder = compiled._binary.parent
    assert compiled(1000).total == peers.cpython_collatz(1000).total
    assert compiled(1000).seconds > 0
    del compiled
    assert not folder.exists()


def test_a_missing_compiler_is_an_absence() -> None:
    with pytest.raises(Absent, match=r"no-such-gcc is not here\. Install it"):
        peers.GccCollatz("no-such-gcc")


def test_the_standard_pool_runs_its_no_op_tasks() -> None:
    said: list[str] = []
    found = peers.noop("pool", tasks=20, trips=3, say=said.append)
    assert found.tasks_per_s > 0 and found.round_trip_p50_ms > 0 and found.boot_s > 0
    assert said == ["pool: 20 no-op tasks, then 3 round trips"]


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> dict[str, str]:
    """A peer whose environment is already there and whose script is ours."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "peer_ray.py").write_text(script)
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path / "scripts")
    folder = tmp_path / "manifold" / f"bench-ray-{peers.PEERS['ray'].version}"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "ready").write_text("")
    return {"XDG_CACHE_HOME": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": "/x"}


def quietly(_line: str) -> None:
    return


def test_a_peer_that_fails_hangs_or_babbles_is_an_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = fake(tmp_path, monkeypatch, "raise SystemExit('no port is free')")
    script = tmp_path / "scripts" / "peer_ray.py"
    with pytest.raises(Absent, match="exit code 1, 'no port is free'"):
        peers.noop("ray", environ=environ, say=quietly)
    script.write_text("print('hello')")
    with pytest.raises(Absent, match="no figures but 'hello'"):
        peers.noop("ray", environ=environ, say=quietly)
    script.write_text("import os, time\nif os.fork():\n    time.sleep(600)\ntime.sleep(600)\n")
    monkeypatch.setattr(peers, "RUN_TIMEOUT_S", 0.3)
    with pytest.raises(Absent, match="its time was over"):
        peers.noop("ray", environ=environ, say=quietly)


def test_a_peer_sees_nothing_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = '{"boot_s": 1, "tasks_per_s": 2, "round_trip_p50_ms": 3, "version": "%s"}'
    script = f"import os\nprint('noise')\nprint('{figures}' % os.environ.get('PYTHONPATH'))\n"
    environ = fake(tmp_path, monkeypatch, script)
    found = peers.noop("ray", environ=environ, say=quietly)
    assert found == peers.Noop(1, 2, 3, "None")


def test_without_the_network_a_peer_is_absent_and_leaves_nothing_half_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nmkdir -p $3/bin\necho 'ERROR: no route to the index'\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    environ = {"XDG_CACHE_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    said: list[str] = []
    with pytest.raises(Absent, match=r"distributed .* cannot be installed: .*no route .*network"):
        peers.noop("dask", environ=environ, say=said.append)
    assert "installing distributed" in said[0]
    (left,) = os.listdir(tmp_path / "manifold")
    assert left.endswith(".lock")


def test_a_peer_is_installed_once_told_with_its_size_and_begun_anew_after_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\ncase $2 in\n"
        "venv) mkdir -p $3/bin; cp $0 $3/bin/python;;\n"
        "pip) echo Downloading it '(9 MB)'; head -c 2000000 /dev/zero > ../bench-ray-9/data;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    environ = {"XDG_CACHE_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    folder = tmp_path / "manifold" / "bench-ray-9"
    (folder / "lib").mkdir(parents=True)  # what an install that was cut off left
    peer = peers.Peer("ray", "peer_ray.py", "ray", "9")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(peers, "_run", _in(folder, peers._run))
    assert peers.environment(peer, environ, said.append) == folder / "bin" / "python"
    assert not (folder / "lib").exists()
    assert "Downloading it (9 MB)" in said[1] and "installed, 2 MB" in said[2]
    peers.environment(peer, environ, said.append)
    assert len(said) == 3


def _in(folder: Path, run):
    """The same, with the peer's folder as working directory once it is there."""

    def run_there(command, timeout_s, environ, _folder, line_seen=None):
        where = folder if folder.exists() else folder.parent
        return run(command, timeout_s, environ, where, line_seen)

    return run_there
