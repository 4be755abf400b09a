"""`ls`, `cat`, `tail`, `watch`: everything that can be read of a cluster, by its path.

A path begins with a slash; a bare `x` is the global `/globals/x`. What lies where is defined by the
namespace (shells/namespace); these verbs print it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from manifold.shells.escapes import visible
from manifold.shells.namespace.following import Follower
from manifold.shells.namespace.table import REGISTERS
from manifold.shells.namespace.values import (
    cell,
    line,
    reading_dict,
    short_name,
    shown,
    type_of,
)
from manifold.shells.sdk.globals_calls import FOLDER
from manifold.shells.verbs.common import (
    connect,
    for_reader,
    json_option,
    not_text,
    print_json,
    print_table,
)
from manifold.shells.verbs.completing import paths
from manifold.shells.verbs.globals import (
    Register,
    stale_option,
    timeout_option,
)
from manifold.shells.verbs.pipes import Reader

if TYPE_CHECKING:
    from manifold.shells.namespace import Namespace

GLOBALS = f"/{FOLDER}"
PREFIX_CHARS_MAX = 250


class Path(click.ParamType[str]):
    """`/nodes/rpi4-01/cpu`; `x` is `/globals/x`."""

    name = "PATH"

    def convert(self, value: Any, parameter: Any, context: Any) -> str:
        text = str(value)
        if not text:
            self.fail("a path is not empty: `manifold ls /` shows what there is.")
        if not_text(text):
            self.fail(f"{text!r} is not UTF-8: no path of a cluster is written so.")
        return text if text.startswith("/") else GLOBALS + text


@contextmanager
def opened(context: click.Context, **options: Any) -> Iterator[tuple[Any, Namespace]]:
    """A client and the namespace over it; what is missing of an answer is told on stderr."""
    from manifold.shells.namespace import Namespace

    with connect(context) as client:
        yield client, Namespace(client, warn=_warn, **options)


def _warn(sentence: str) -> None:
    click.secho(visible(sentence), fg="yellow", err=True)


# -- ls -------------------------------------------------------------------------------------------


@click.command("ls")
@click.argument("path", default="/globals", type=Path(), metavar="[PATH]", shell_complete=paths)
@click.option("-l", "--long", "detailed", is_flag=True, help="A line on each.")
@stale_option
@timeout_option
@json_option
@click.pass_context
def ls(
    context: click.Context, path: str, detailed: bool, stale: bool, timeout: float, as_json: bool
) -> None:
    """What is in the folder PATH of the namespace; `/` is all of it.

    Of registers (/globals, which is meant without PATH, /cluster, /registers) names, values and
    versions are shown, also for the beginning of a name. --stale and --timeout are for those.
    """
    root = "/" + path.strip("/").partition("/")[0]
    with opened(context, stale=stale, timeout_s=timeout) as (client, space):
        if root in REGISTERS:
            prefix = _prefix(path, root)
            calls = client.calls_of_globals
            found, strength = client.connection.call(calls.items(prefix, timeout, stale))
            _print_registers(path, prefix, found, strength, as_json)
            return
        entries = space.list(path)
    folder = path.rstrip("/")
    if as_json:
        print_json(
            [
                {"path": f"{folder}/{e.name}", "name": e.name, "kind": e.kind, "summary": e.summary}
                for e in entries
            ]
        )
    elif detailed:
        print_table(["name", "kind", "what"], [(e.name, e.kind, e.summary) for e in entries])
    else:
        for entry in entries:
            slash = "/" if entry.kind == "folder" and folder else ""
            click.echo(visible(f"{entry.name}{slash}" if folder else f"/{entry.name}"))


def _prefix(path: str, root: str) -> str:
    """The keys that are meant: a root is a folder, what follows it any beginning of a name."""
    rest = path.removeprefix(root).removeprefix("/")
    if len(rest) > PREFIX_CHARS_MAX or rest.startswith("/") or "//" in rest:
        raise click.BadParameter(f"{path!r} is no path: /globals, /globals/PREFIX or /.")
    return REGISTERS[root].prefix + rest


def _print_registers(path: str, prefix: str, found: Any, strength: str, as_json: bool) -> None:
    if as_json:
        print_json([reading_dict(key, reading) for key, reading in found])
        return
    if found:
        rows = [
            (short_name(key), cell(shown(each.value)), type_of(each.value), each.version)
            for key, each in found
        ]
        print_table(["name", "value", "type", "version"], rows)
    count = f"{len(found):,} name{'' if len(found) == 1 else 's'}" if found else "nothing"
    where = f"/{prefix}".rstrip("/") if prefix else path.rstrip("/")
    click.secho(visible(f"{count} under {where}  ({strength})"), dim=True)


# -- cat, tail, watch -----------------------------------------------------------------------------


@click.command()
@click.argument(
    "where", type=Path(), nargs=-1, required=True, metavar="PATH…", shell_complete=paths
)
@stale_option
@timeout_option
@json_option
@click.pass_context
def cat(
    context: click.Context, where: tuple[str, ...], stale: bool, timeout: float, as_json: bool
) -> None:
    """Print what lies at each PATH: a number or a word on one line, a status as `key: value`.

    With --json a value; of several an object of paths and values.
    """
    with opened(context, stale=stale, timeout_s=timeout) as (_, space):
        if as_json:
            values = {path: space.value(path) for path in where}
            print_json(values[where[0]] if len(where) == 1 else values)
            return
        for path in where:
            sys.stdout.write(for_reader(space.read(path)))


@click.command()
@click.argument("path", type=Path(), metavar="PATH", shell_complete=paths)
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, or as it changes.")
@click.option("-n", "--lines", "count", type=click.IntRange(0, 100_000), default=10)
@json_option
@click.pass_context
def tail(context: click.Context, path: str, follow: bool, count: int, as_json: bool) -> None:
    """The last lines of PATH, a log or anything else; with -f also what comes, until Ctrl-C."""
    with opened(context) as (_, space):
        if follow:
            with Reader() as reader:
                for value, text in space.changes(path, last=count, stop=reader):
                    _say(value, text, as_json)
            return
        log = space.kind(path) == "log"
        for value, text in space.last(path, count):
            _say(value if log else text, text, as_json)


def _say(value: object, text: str, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        click.echo(for_reader(text))
    sys.stdout.flush()


@click.command()
@click.argument("path", metavar="PATH", shell_complete=paths)
@click.option("--count", type=click.IntRange(min=1), default=None, help="End after so many lines.")
@json_option
@click.pass_context
def watch(context: click.Context, path: str, count: int | None, as_json: bool) -> None:
    """A line for what lies at PATH, and one for each change, until Ctrl-C.

    PATH is a global NAME, or anything of the namespace; of a folder `+ NAME` comes and `- NAME`
    goes. Changes that follow each other fast may be told as one; the last one never is left out.
    """
    from itertools import islice

    key = _register(path, context)
    lines: Iterator[tuple[object, str]]
    with opened(context) as (client, space), Reader() as reader:
        if key is not None:
            states = Follower(client, reader).states(key)
            lines = ((reading_dict(key, each), line(short_name(key), each)) for each in states)
        else:
            full = Path().convert(path, None, context)
            lines = _changes(space.changes(full, last=0, stop=reader), full, space.kind(full))
        for value, text in islice(lines, count):
            _say(value, text, as_json)


def _register(path: str, context: click.Context) -> str | None:
    """The key that is meant, where it is a register and no folder of them."""
    root = "/" + path.strip("/").partition("/")[0]
    bare = not path.startswith("/")
    if not bare and (root not in REGISTERS or path.endswith("/") or path == root):
        return None
    key: str = Register(anywhere=True).convert(path, None, context)
    return key


def _changes(
    changes: Iterator[tuple[object, str]], path: str, kind: str
) -> Iterator[tuple[object, str]]:
    """Lines of a log as they are; else each line that has changed after the path."""
    for value, text in changes:
        if kind == "log":
            yield value, text
            continue
        joint = " = " if kind == "file" and not isinstance(value, dict | list) else " "
        told = value if kind == "folder" else {"path": path, "value": value}
        yield told, "\n".join(f"{path}{joint}{each}" for each in text.split("\n"))
