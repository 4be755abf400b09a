"""The style checker finds each kind of violation that is planted, and only those."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifold.tools.tidy import RATCHET, main, tidy

ROOT = Path(__file__).parents[2]
PROTOCOL = "kernel/nexus/protocol.py"


def findings(root: Path, files: dict[str, str]) -> list[str]:
    """What tidy says of these files; each gets a docstring and is used unless it says otherwise."""
    modules = []
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".py"):
            modules.append("manifold." + name.removesuffix(".py").replace("/", "."))
            text = text if text.startswith(('"""', "#raw\n")) else f'"""A file."""\n{text}'
        path.write_text(text)
    roof = root / "src" / "manifold" / "__init__.py"
    roof.parent.mkdir(parents=True, exist_ok=True)
    roof.write_text('"""Uses all."""\n' + f"USED = {modules!r}\n")
    return [str(each) for each in tidy(root)]


def test_a_tidy_tree_has_no_findings(tmp_path: Path) -> None:
    assert not findings(
        tmp_path,
        {
            "vm/kid.py": "import re\n",
            "kernel/limits.py": "A = 1\n",
            "kernel/nexus/messages.py": "from manifold.vm.kid import Kid\n",
            PROTOCOL: "from random import Random\nfrom manifold.kernel.limits import A\n"
            "from manifold.kernel.nexus.messages import B\n"
            "from manifold.kernel.geode.metric import C\n"
            "from manifold.kernel.scheduler.messages import D\n",
            "kernel/nexus/driver.py": "import asyncio\nimport manifold.kernel.nexus.protocol\n",
            "kernel/scheduler/messages.py": "",
            "kernel/geode/metric.py": "import math\n",
            "kernel/node.py": "import os\nfrom manifold.kernel.nexus.driver import D\n",
            "shells/sdk.py": "from manifold.kernel.nexus.messages import B\n"
            "from manifold.kernel.hyperbus.client import C\nfrom manifold.vm.kid import Kid\n",
            "tools/emulator.py": "from manifold.shells.sdk import connect\n"
            "from manifold.kernel.node import N\n",
        },
    )


IMPORTS = [
    ("vm/a.py", "from manifold.kernel.errors import E", "vm/ may import only what is beneath"),
    ("kernel/node.py", "from manifold.shells.sdk import S", "kernel/ may import only what is ben"),
    ("shells/a.py", "import manifold.tools.emulator", "shells/ may import only what is beneath"),
    ("tools/a.py", "from manifold.images.board import x", "tools/ may import only what is beneath"),
    ("tools/a.py", "from manifold import connect", "imports manifold, but tools/ may import only"),
    ("shells/a.py", "from manifold.kernel.node import Node", "shells take of the kernel only conf"),
    ("shells/a.py", "from manifold.kernel.nexus.driver import D", "shells take of the kernel only"),
    ("shells/a.py", "from manifold.kernel.effects import Send", "shells take of the kernel only"),
    ("kernel/config.py", "from manifold.kernel.node import N", "which is above config"),
    ("kernel/geode/a.py", "from manifold.kernel.scheduler.ledger import J", "which is above geode"),
    ("kernel/nexus/a.py", "from manifold.kernel.node import N", "which is above nexus"),
    ("kernel/nexus/a.py", "from manifold.kernel.scheduler.ledger import J", "its sibling schedule"),
    ("kernel/node.py", "def f():\n    from manifold.kernel.main import m", "which is above node"),
    ("kernel/a.py", "import kernel.config", "imports kernel.config; import manifold.kernel.config"),
    ("kernel/a.py", "import pytest", "imports pytest, which is for tests"),
    ("tools/a.py", "from tests.unit import x", "imports tests.unit, which is for tests"),
    ("kernel/a.py", "from . import b", "a relative import; write manifold.…"),
    ("kernel/a.py", "from math import *", "imports *; name what is used"),
]


@pytest.mark.parametrize("path, text, expected", IMPORTS)
def test_an_import_that_does_not_point_down_is_found(
    path: str, text: str, expected: str, tmp_path: Path
) -> None:
    (found,) = findings(tmp_path, {path: text})
    line = 2 + text.count("\n")
    assert found.startswith(f"{path}:{line}: ") and expected in found


IMPURE = [
    "import time",
    "import random",
    "from random import Random, choice",
    "from random import shuffle",
    "import asyncio",
    "import socket",
    "from os import urandom",
    "import os.path",
    "import logging",
    "import threading",
    "def f():\n    from time import monotonic",
    "from manifold.kernel.nexus.driver import D",
    "def f():\n    return open('x')",
    "def f():\n    print(1)",
    "def f(x):\n    return hash(x)",
    "for x in {1, 2}:\n    pass",
    "for x in set([1]):\n    pass",
    "a = [x for x in frozenset((1, 2))]",
    "a = {x: 1 for x in {1, 2}}",
    "a = list({1, 2})",
    "a = next(iter({1, 2}))",
    "a = [*{1, 2}]",
    "a = ','.join({'a', 'b'})",
    "a = max({1, 2}, key=abs)",
    "def f(votes: set[int]) -> None:\n    for x in votes - {1}:\n        pass",
    "class A:\n    votes: set[int]\n    def f(self):\n        return [x for x in self.votes]",
    "class A:\n    def __init__(self):\n        self.votes = set()\n        self.votes.pop()",
]


@pytest.mark.parametrize("text", IMPURE)
@pytest.mark.parametrize("path", [PROTOCOL, "kernel/nexus/helper.py", "kernel/geode/metric.py"])
def test_what_could_make_two_runs_differ_is_found_in_pure_files(
    text: str, path: str, tmp_path: Path
) -> None:
    files = {PROTOCOL: "", "kernel/nexus/driver.py": "", path: text}
    found = findings(tmp_path, files)
    found = [each for each in found if "sibling" not in each and "is above" not in each]
    assert [each.split(":")[0] for each in set(found)] == [path] * len(found)
    assert all("a pure file" in each or "order of a set" in each for each in found) and found


@pytest.mark.parametrize("text", [each for each in IMPURE if "driver" not in each])
def test_drivers_and_folders_without_a_protocol_may_touch_the_world(
    text: str, tmp_path: Path
) -> None:
    files = {PROTOCOL: "", "kernel/nexus/driver.py": text, "kernel/hyperbus/sockets.py": text}
    assert not findings(tmp_path, files)


CALM = [
    "a = sorted({2, 1})",
    "a = len({1})",
    "a = 1 in {1, 2}",
    "a = any(x > 1 for x in {1, 2})",
    "a = {x + 1 for x in {1, 2}}",
    "a = max({1, 2})",
    "for x in sorted({1, 2}):\n    pass",
    "def f(a: set[int]):\n    return a | {1}",
    "def f(a: list[int]):\n    for x in a:\n        pass",
    "def f():\n    a = {1}\n    a = [1]\n    return list(a)",
    "def f(random: Random):\n    return random.choice([1])",
]


@pytest.mark.parametrize("text", CALM)
def test_a_set_whose_order_does_not_show_is_no_finding(text: str, tmp_path: Path) -> None:
    assert not findings(tmp_path, {PROTOCOL: text})


def test_a_circle_is_found_even_through_functions_and_is_named_whole(tmp_path: Path) -> None:
    files = {
        "vm/a.py": "from manifold.vm.b import x\n",
        "vm/b.py": "def f():\n    import manifold.vm.c\n",
        "vm/c.py": "from manifold.vm import a\n",
        "vm/d.py": "from manifold.vm.a import x\n",
    }
    (found,) = findings(tmp_path, files)
    assert found.startswith(
        "vm/a.py:2: a circle: manifold.vm.a -> manifold.vm.b -> manifold.vm.c -"
    )


def test_a_package_that_imports_a_part_of_itself_is_no_circle_of_one(tmp_path: Path) -> None:
    package = "vm/a/__init__.py"
    lazily = "def __getattr__(name):\n    from manifold.vm.a import missing\n"
    assert not findings(tmp_path, {package: lazily})
    (found,) = findings(
        tmp_path, {package: lazily + "import manifold.vm.b\n", "vm/b.py": "import manifold.vm.a\n"}
    )
    assert "a circle: manifold.vm.a -> manifold.vm.b -> manifold.vm.a;" in found


def test_imports_for_types_alone_make_no_circle(tmp_path: Path) -> None:
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from manifold.vm.a import x\n"
    assert not findings(tmp_path, {"vm/a.py": "import manifold.vm.b\n", "vm/b.py": types})


# --- sizes ------------------------------------------------------------------------------------


def long_function(lines: int, name: str = "f") -> str:
    return f"def {name}():\n" + "    a = 1\n" * (lines - 1)


def test_a_function_longer_than_a_screen_is_found(tmp_path: Path) -> None:
    assert not findings(tmp_path, {"vm/a.py": long_function(70)})
    method = "class A:\n" + "".join(f"    {line}\n" for line in long_function(71).splitlines())
    (found,) = findings(tmp_path, {"vm/a.py": method})
    assert found == "vm/a.py:3: A.f has 71 lines of at most 70; split it"


def test_a_file_of_more_than_six_hundred_lines_is_found(tmp_path: Path) -> None:
    assert not findings(tmp_path, {"vm/a.py": "a = 1\n" * 599})
    (found,) = findings(tmp_path, {"vm/a.py": "a = 1\n" * 600})
    assert found == "vm/a.py:1: has 601 lines of at most 600; split it"


@pytest.mark.parametrize(
    "allowed, lines, expected",
    [
        (80, 80, []),
        (80, 81, ["vm/a.py:2: f has 81 lines of at most 80; split it"]),
        (80, 75, [f"{RATCHET}:2: vm/a.py:f has shrunk; lower its 80 to 75"]),
        (80, 70, [f"{RATCHET}:2: vm/a.py:f is within the limit or gone; remove this line"]),
    ],
)
def test_the_ratchet_only_turns_one_way(
    allowed: int, lines: int, expected: list[str], tmp_path: Path
) -> None:
    files = {"vm/a.py": long_function(lines), RATCHET: f"# sizes\n{allowed} vm/a.py:f\n"}
    assert findings(tmp_path, files) == expected


def test_a_ratchet_that_cannot_be_read_is_found(tmp_path: Path) -> None:
    (found,) = findings(tmp_path, {RATCHET: "vm/a.py 80\n"})
    assert found == f"{RATCHET}:1: write `LINES PATH` or `sleep PATH WHY`"


# --- one file at a time -----------------------------------------------------------------------


def test_a_module_without_a_docstring_is_found_unless_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "__init__.py").write_text("")
    (found,) = findings(tmp_path, {"vm/a.py": "#raw\na = 1\n"})
    assert found == "vm/a.py:1: has no docstring; say what it is for and what holds in it"


SWALLOWED = [
    "try:\n    f()\nexcept Exception:\n    pass",
    "try:\n    f()\nexcept (ValueError, Exception):\n    ...",
    "for x in y:\n    try:\n        f()\n    except BaseException:\n        continue",
    "try:\n    f()\nexcept:\n    pass",
    "import contextlib\nwith contextlib.suppress(Exception):\n    f()",
    "try:\n    f()\nexcept AssertionError as e:\n    log(e)",
]


@pytest.mark.parametrize("text", SWALLOWED)
def test_a_swallowed_error_is_found(text: str, tmp_path: Path) -> None:
    (found,) = findings(tmp_path, {"tools/a.py": text})
    assert "swallows" in found or "suppresses" in found or "our bug" in found


def test_a_named_error_may_be_ignored_and_any_error_may_be_handled(tmp_path: Path) -> None:
    text = "try:\n    f()\nexcept OSError:\n    pass\nexcept Exception as e:\n    log(e)\n"
    assert not findings(tmp_path, {"tools/a.py": text})


@pytest.mark.parametrize("text", ["import time\ntime.sleep(1)", "from time import sleep\nsleep(1)"])
@pytest.mark.parametrize("path", ["kernel/node.py", "shells/a.py", "tools/a.py"])
def test_nobody_sleeps_without_a_reason(text: str, path: str, tmp_path: Path) -> None:
    (found,) = findings(tmp_path, {path: text})
    assert found.startswith(f"{path}:3: calls time.sleep")
    assert not findings(tmp_path, {path: text, RATCHET: f"sleep {path} the board's own clock\n"})
    (found,) = findings(tmp_path, {path: "", RATCHET: f"sleep {path} the board's own clock\n"})
    assert found == f"{RATCHET}:1: {path} does not sleep; remove this line"


def test_a_module_that_nobody_uses_is_found(tmp_path: Path) -> None:
    files = {
        "vm/used.py": "",
        "vm/by_itself.py": "MYSELF = 'manifold.vm.by_itself'\n",
        "shells/table.py": "A = 'manifold.tools.up:main'\nfrom manifold.vm.used import x\n",
        "tools/up.py": "",
        "tools/bench/boot.py": "",
        "tools/tidy.py": "if __name__ == '__main__':\n    pass\n",
    }
    findings(tmp_path, files)
    (tmp_path / "src" / "manifold" / "__init__.py").write_text("")
    found = [str(each) for each in tidy(tmp_path)]
    assert found == [
        "shells/table.py:1: nobody imports it; use it or remove it",
        "vm/by_itself.py:1: nobody imports it; use it or remove it",
    ]


def test_a_file_that_does_not_parse_is_a_finding_and_not_a_crash(tmp_path: Path) -> None:
    (found,) = findings(tmp_path, {"vm/a.py": "def\n"})
    assert found == "vm/a.py:2: is not Python; make it parse"


def test_the_command_exits_with_one_where_there_are_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings(tmp_path, {"vm/a.py": "from math import *\n"})
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == "vm/a.py:2: imports *; name what is used\n"
    findings(tmp_path, {"vm/a.py": ""})
    assert main([str(tmp_path)]) == 0


def test_the_repository_itself_is_tidy() -> None:
    found = tidy(ROOT)
    assert not found, "\n".join(map(str, found))
