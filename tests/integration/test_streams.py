"""Arguments and streams that are not as they should be: a sentence and a code, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from manifold.tools.emulator.testing import TestCluster

ODD = b"\xff"  # no UTF-8
COLLATZ = (Path(__file__).parents[2] / "examples" / "collatz.ent").read_bytes()
Word = str | bytes


def manifold(
    environ: Mapping[str, str], *arguments: Word, redirect: str = ""
) -> tuple[int, str, str]:
    """Exit code, output and errors; `redirect` as a shell has it."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "manifold", *arguments],
        env={**environ, "PYTHONUNBUFFERED": ""}, capture_output=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()
    for said in (out, err):
        assert "Traceback" not in said, said
        assert "Exception ignored" not in said, said
        assert "Error:" not in said.replace("Error: Invalid", ""), said
    return done.returncode, out, err


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "line",
    ["profile server-01 --seconds", "record FILE --seconds", "replay FILE --speed",
     "sim --duration", "torture nexus --seconds", "get x --timeout"],
)  # fmt: skip
def test_what_is_no_number_is_refused(
    manifold_environment: dict[str, str], line: str, number: str
) -> None:
    code, out, err = manifold(manifold_environment, *line.split(), number)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")


@pytest.fixture
def environ(manifold_clusters: object) -> Iterator[dict[str, str]]:
    cluster = manifold_clusters(1)  # type: ignore[operator]
    assert isinstance(cluster, TestCluster)
    yield cluster.environ


def test_arguments_that_are_no_utf_8_are_refused_by_every_verb(
    environ: dict[str, str], tmp_path: Path
) -> None:
    program = os.fsencode(tmp_path) + b"/odd" + ODD + b".ent"
    with open(program, "wb") as file:
        file.write(COLLATZ)
    lines: list[tuple[Word, ...]] = [
        *((verb, b"/globals/" + ODD) for verb in ("ls", "cat", "tail", "watch", "get", "del")),
        *((verb, ODD) for verb in ("ls", "cat", "tail", "watch", "get", "del", "why", "kill")),
        ("cat", b"/nodes/" + ODD + b"/cpu"), ("set", "x", ODD), ("set", ODD, "1"),
        ("cas", "x", "1", ODD), ("get", b"/registers/" + ODD), ("node", "inspect", ODD),
        ("logs", "--node", ODD), ("logs", "--grep", ODD), ("metrics", ODD), ("profile", ODD),
        ("--cluster", ODD, "status"), ("export", ODD), (ODD,), ("run", b"no" + ODD + b".ent"),
    ]  # fmt: skip
    for line in lines:
        code, out, err = manifold(environ, *line)
        assert code in (1, 2, 3, 4), (line, code, out, err)
        assert "error: " in err, (line, err)
    code, _, err = manifold(environ, "run", program, "--range", "1:10")
    assert code == 0, err
    assert r"odd\xff.ent" in manifold(environ, "jobs", "--all")[1]
    code, _, err = manifold(environ, "run", program, "--range", "1:10", "--class", ODD)
    assert (code, "is not UTF-8" in err) == (2, True)
    assert manifold(environ, "status")[0] == 0


def test_completing_what_is_no_utf_8_is_silent(environ: dict[str, str]) -> None:
    for words in (b"manifold cat /globals/", b"manifold get ", b"manifold node inspect "):
        asked = {
            "_MANIFOLD_COMPLETE": "bash_complete", "COMP_CWORD": str(len(words.split()) - 1),
            "COMP_WORDS": os.fsdecode(words + ODD),
        }  # fmt: skip
        if not words.endswith(b"/"):
            asked["COMP_CWORD"] = str(len(words.split()))
        code, out, err = manifold(environ | asked)
        assert (code, out.strip(), err) == (0, "", "")


@pytest.mark.parametrize("arguments", [["version"], ["--help"], ["version", "--json"]])
def test_a_full_disk_is_an_error(
    manifold_environment: dict[str, str], arguments: list[str]
) -> None:
    code, _, err = manifold(manifold_environment, *arguments, redirect=">/dev/full")
    assert code == 1
    assert err.startswith("error: Output cannot be written: No space left on device.")


@pytest.mark.parametrize("redirect", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_nowhere_to_print(
    environ: dict[str, str], redirect: str
) -> None:
    code, out, err = manifold(environ, "status", redirect=redirect)
    assert (code, err) == (0, "")
    assert bool(out) == (">&-" not in redirect.replace("2>&-", ""))
    assert manifold(environ, "cat", "missing", redirect=redirect)[0] == 4


def test_what_an_encoding_lacks_is_shown(environ: dict[str, str]) -> None:
    assert manifold(environ, "set", "x", "größer")[0] == 0
    code, out, err = manifold(environ | {"PYTHONIOENCODING": "ascii"}, "cat", "x")
    assert (code, out, err) == (0, "gr\\xf6\\xdfer\n", "")
    _, out, _ = manifold(environ | {"PYTHONIOENCODING": "ascii"}, "get", "x", "--json")
    assert out.isascii()


def test_json_of_an_error_is_ascii(manifold_environment: dict[str, str]) -> None:
    code, out, _ = manifold(manifold_environment, "cat", b"/globals/" + ODD, "--json")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "usage"
