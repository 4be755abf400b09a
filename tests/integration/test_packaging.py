"""The wheel is complete: it runs without the checkout, with its configuration and examples."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy of what git tracks: `build/` stays out of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout  # fmt: skip
    for name in filter(None, tracked.decode().split("\0")):
        here, there = ROOT / name, source / name
        if here.is_symlink() or here.is_file():
            there.parent.mkdir(parents=True, exist_ok=True)
            if here.is_symlink():
                there.symlink_to(os.readlink(here))
            else:
                there.write_bytes(here.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_the_configuration_and_the_examples(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("kernel", "vm", "shells", "tools", "images"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"manifold/{path.relative_to(ROOT)}" in names
    assert {"manifold/manifold.yaml", "manifold/py.typed"} <= names
    for path in (ROOT / "profiles").iterdir():
        assert f"manifold/profiles/{path.name}" in names
    for name in ("page.html", "page.js", "page.css", "icon.svg"):
        assert f"manifold/shells/web/{name}" in names
    for path in (ROOT / "examples").glob("*.*"):
        if path.suffix in (".ent", ".json"):
            assert f"manifold/examples/{path.name}" in names


def test_the_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "import manifold; from manifold.kernel.config import load; "
        "print(manifold.__file__, len(load(None, {}, {}).classes))"
    )
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environ,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    where, classes = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert int(classes) == 4
