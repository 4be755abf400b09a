"""What the web console is made of, and what its verb refuses before it serves."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from manifold.kernel.errors import Refused, Unsupported
from manifold.shells.web import assets
from manifold.shells.web.server import loopback


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "example.com", "", "127.0.0.1.evil", "::1%lo", "127.1"]
)
def test_only_loopback_is_listened_on(host: str) -> None:
    with pytest.raises(Refused, match=r"no loopback address.*in the clear"):
        loopback(host)


def test_no_file_names_another_host() -> None:
    allowed = {"http://www.w3.org/2000/svg"}  # a namespace, which nobody fetches
    files = {name: asset.content.decode() for name, asset in assets.load().items()}
    for name, text in {**files, "page.html": assets.page()}.items():
        if name == "xterm.css":
            text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        found = set(re.findall(r"(?:https?:|wss?:)?//[a-zA-Z0-9][^\s\"'`)]*\.[^\s\"'`)]*", text))
        assert {each for each in found if each.startswith(("http", "ws"))} <= allowed, name
        assert not re.search(r"(?:src|href)\s*=\s*[\"']?//|url\(|@import", text), name


def test_a_textual_serve_that_looks_different_is_refused() -> None:
    known = assets.load()["xterm.js"].content.decode()
    assert known.count("window.Xterm={Terminal:") == 1
    for unknown in ("", "window.onload=1", "window.onload=1;window.onload=new v.Terminal"):
        with pytest.raises(Unsupported, match="not one that Manifold knows"):
            assets.terminal_script(unknown)


@pytest.mark.parametrize("module", ["textual_serve", "aiohttp"])
def test_where_the_extra_is_missing_it_is_said_what_to_install(module: str) -> None:
    script = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['manifold', 'web', '--json']; "
        "from manifold.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, done.stderr) == (2, "")
    assert "manifold-os[web]" in error["next"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--host", "0.0.0.0"], 4, "no loopback address"),
        (["--port", "65536"], 2, "65536"),
        (["--port", "1", "--host", "example.com"], 4, "no loopback address"),
    ],
)
def test_the_verb_says_why_it_does_not_serve(arguments: list[str], code: int, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "manifold", "web", "--json", *arguments],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")
    assert says in json.loads(done.stdout)["error"]["message"]


def test_the_page_has_one_place_to_fill_in() -> None:
    assert set(re.findall(r"\{\w+\}", assets.page())) == {"{title}"}
