"""`web`: the console in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manifold.kernel import places
from manifold.kernel.errors import Unsupported
from manifold.shells.verbs.common import cluster_name, json_option, print_json

if TYPE_CHECKING:
    from manifold.shells.web.server import WebServer

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0: any that is free.")
@click.option("--host", default="127.0.0.1", help="A loopback address.")
@click.option("--read-only", is_flag=True, help="A console that looks and changes nothing.")
@click.option("--open/--no-open", "opens", default=False, help="Open it in your browser.")
@json_option
@click.argument("options", nargs=-1, metavar="[-- CONSOLE OPTIONS]")
@click.pass_context
def web(
    context: click.Context,
    port: int,
    host: str,
    read_only: bool,
    opens: bool,
    as_json: bool,
    options: tuple[str, ...],
) -> None:
    """Serve the console to a browser on this machine, behind a token, until Ctrl-C."""
    try:
        from manifold.shells.web.server import Served, WebServer
    except ModuleNotFoundError as fault:
        if (fault.name or "").split(".")[0] not in ("aiohttp", "textual_serve"):
            raise
        raise Unsupported(
            f"`manifold web` needs {fault.name}, which is not installed.",
            "Install the extra: pip install 'manifold-os[web]'",
        ) from fault
    cluster = cluster_name(context)
    places.cluster_dir(cluster, os.environ)  # refuses a name that is none
    served = Served(console(cluster, read_only, options), f"Manifold — {cluster}")
    asyncio.run(_until_stopped(WebServer(served, host, port), opens, as_json))


def console(cluster: str, read_only: bool, options: Sequence[str]) -> list[str]:
    """The command of a session. `-P`: what lies in the folder must not be imported."""
    command = [sys.executable, "-P", "-m", "manifold", "--cluster", cluster, "console"]
    return [*command, *(["--read-only"] if read_only else []), *options]


async def _until_stopped(server: WebServer, opens: bool, as_json: bool) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOPS:
        loop.add_signal_handler(number, stopped.set)
    await server.start()
    try:
        if as_json:
            print_json({"address": server.address, "port": server.port, "pid": os.getpid()})
        else:
            click.echo(f"open  {server.address}")
            click.echo("      It is for you alone: whoever has it has the console. Ctrl-C ends it.")
        sys.stdout.flush()
        with contextlib.ExitStack() as until_stopped:
            if opens:
                folder = tempfile.TemporaryDirectory(prefix="manifold-web-")
                path = Path(until_stopped.enter_context(folder))
                _open(server.address, path)
            await stopped.wait()
    finally:
        await server.stop()


def _open(address: str, folder: Path) -> None:
    """By way of a file that only its owner reads: arguments of a process are seen by everybody.

    A browser that runs in the foreground keeps the thread, and the thread keeps nobody.
    """
    path = folder / "open.html"
    path.touch(mode=0o600)
    path.write_text(f'<!DOCTYPE html><meta http-equiv="refresh" content="0;url={address}">')
    threading.Thread(target=_browse, args=(path.as_uri(),), name="browser", daemon=True).start()


def _browse(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        click.echo("No browser was found here: open the address in one.", err=True)
