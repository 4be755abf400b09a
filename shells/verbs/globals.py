"""`get`, `set`, `cas`, `add`, `del`: values that the whole cluster agrees on.

A global is written `/globals/x`, or `x` for short; registers of the cluster's own (`/cluster/…`)
can be read and listed. Values are ints and floats by their syntax, anything else is text; `--type`
decides otherwise. Every acknowledgement says how strong it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from manifold.kernel.errors import NotFound, Refused
from manifold.kernel.nexus.messages import KEY_CHARS_MAX
from manifold.shells.namespace.values import (
    FLOAT,
    HEX,
    INT,
    line,
    reading_dict,
    short_name,
    shown,
    type_of,
)
from manifold.shells.sdk.globals_calls import (
    FOLDER,
    NAME_RULE,
    Calls,
    Reading,
    Value,
    encode,
    key_of,
)
from manifold.shells.sdk.registers import TIMEOUT_S
from manifold.shells.verbs import completing
from manifold.shells.verbs.common import connect, for_reader, json_option, not_text, print_json
from manifold.shells.verbs.run import Seconds

T = TypeVar("T")

NEGATIVE = re.compile(r"-[0-9.]")
ESCAPE = "\0"  # before a negative number on its way through the parser: no argument can hold it
REGISTERS = "/registers/"  # before a whole key, where the namespace has it
TYPES = ("int", "float", "text", "bytes")


# -- values, as people write and read them --------------------------------------------------------


def parse(text: str, kind: str = "") -> Value:
    """A value from the command line; `kind` where its syntax is not to decide."""
    try:
        if kind == "text":
            return text
        if kind == "bytes":
            return bytes.fromhex(text.removeprefix(HEX))
        if kind == "float" or (not kind and FLOAT.match(text)):
            return float(text)
        if kind == "int" or INT.match(text):
            return int(text)
    except ValueError:
        hint = "write bytes in hexadecimal, such as 00ff" if kind == "bytes" else "see --type"
        raise click.BadParameter(f"{text!r} is no {kind}: {hint}.") from None
    return text


# -- arguments ------------------------------------------------------------------------------------


class Register(click.ParamType[str]):
    """`/globals/x` or `x`; with `anywhere` also registers that are no globals. A whole key."""

    name = "NAME"

    def __init__(self, *, anywhere: bool = False) -> None:
        self._anywhere = anywhere

    def convert(self, value: Any, parameter: Any, context: Any) -> str:
        text = str(value)
        if not_text(text):
            self.fail(f"{text!r} is not UTF-8. {NAME_RULE}")
        if self._anywhere and len(text.removeprefix(REGISTERS)) > KEY_CHARS_MAX + 1:
            self.fail(f"{text[:80]!r}… is too long for a register. {NAME_RULE}")
        if self._anywhere and text.startswith(REGISTERS) and len(text) > len(REGISTERS):
            return text.removeprefix(REGISTERS)
        other = text.startswith("/") and not text.startswith("/" + FOLDER)
        if other and self._anywhere and text.count("/") > 1:
            return text[1:]
        if other and self._anywhere and text.strip("/"):
            self.fail(f"{text!r} is a folder: `manifold ls {text}` shows what is in it.")
        if other:
            self.fail(f"{text!r} is not under /globals. {NAME_RULE}")
        try:
            return key_of(text)
        except ValueError as error:
            self.fail(str(error))


class Valued(click.Command):
    """A command whose arguments may be negative numbers, which are no options."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(
            context, [ESCAPE + each if NEGATIVE.match(each) else each for each in args]
        )


class Text(click.ParamType[str]):
    """Of a `Valued` command."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, parameter: Any, context: Any) -> str:
        return str(value).removeprefix(ESCAPE)


name_argument = click.argument(
    "name", type=Register(), metavar="NAME", shell_complete=completing.names
)
type_option = click.option(
    "--type", "kind", type=click.Choice(TYPES), default=None, help="Of the values; else by syntax."
)
stale_option = click.option("--stale", is_flag=True, help="What one voter knows will do.")
timeout_option = click.option(
    "--timeout", type=Seconds(), default=TIMEOUT_S, show_default=True, help="In seconds."
)


def _done(context: click.Context, call: Callable[[Calls], Coroutine[Any, Any, T]]) -> T:
    """What a call comes to, on a connection for it alone."""
    with connect(context) as client:
        found: T = client.connection.call(call(client.calls_of_globals))
        return found


def _encoded(text: str, kind: str | None) -> int | float | bytes:
    try:
        return encode(parse(text, kind or ""))
    except OverflowError as error:
        raise click.BadParameter(f"{error} Use --type text.") from None


def _say(key: str, reading: Reading, json_wanted: bool) -> None:
    if json_wanted:
        print_json(reading_dict(key, reading))
    else:
        click.echo(line(short_name(key), reading))


def _absent(key: str) -> NotFound:
    return NotFound(f"There is no /{key}.", "`manifold ls` lists those there are.")


# -- verbs ----------------------------------------------------------------------------------------


@click.command()
@click.argument(
    "name", type=Register(anywhere=True), metavar="NAME", shell_complete=completing.names
)
@stale_option
@click.option("--value", "bare", is_flag=True, help="Print the value alone, for scripts.")
@timeout_option
@json_option
@click.pass_context
def get(
    context: click.Context, name: str, stale: bool, bare: bool, timeout: float, as_json: bool
) -> None:
    """What the global NAME (/globals/x, or x) holds.

    A majority of the voters is asked, so that nothing newer was agreed to before; with --stale a
    minority may answer, and the answer is marked so.
    """
    reading = _done(context, lambda calls: calls.read(name, timeout, stale))
    if reading.value is None:
        raise _absent(name)
    if not bare or as_json:
        _say(name, reading, as_json)
    elif isinstance(reading.value, bytes):
        sys.stdout.buffer.write(reading.value)
    else:
        click.echo(for_reader(str(reading.value)))


@click.command("set", cls=Valued)
@name_argument
@click.argument("value", type=Text("VALUE"), metavar="VALUE")
@type_option
@timeout_option
@json_option
@click.pass_context
def set_(
    context: click.Context, name: str, value: str, kind: str | None, timeout: float, as_json: bool
) -> None:
    """Set the global NAME to VALUE: 1 is an int, 1.5 a float, the rest text."""
    data = _encoded(value, kind)
    _say(name, _done(context, lambda calls: calls.set(name, data, timeout)), as_json)


@click.command(cls=Valued)
@name_argument
@click.argument("values", type=Text("VALUE"), nargs=-1, metavar="[EXPECTED] NEW")
@click.option("--absent", is_flag=True, help="Expect nothing there, instead of EXPECTED.")
@type_option
@timeout_option
@json_option
@click.pass_context
def cas(
    context: click.Context,
    name: str,
    values: tuple[str, ...],
    absent: bool,
    kind: str | None,
    timeout: float,
    as_json: bool,
) -> int:
    """Set NAME to NEW if it holds EXPECTED (compare and swap).

    Exit status 1, and what it holds, where it holds something else. Types count: 1 is not 1.0.
    """
    if len(values) != (1 if absent else 2):
        wanted = "--absent NAME NEW" if absent else "NAME EXPECTED NEW"
        raise click.UsageError(f"Write `manifold cas {wanted}`.", context)
    expected = None if absent else _encoded(values[0], kind)
    data = _encoded(values[-1], kind)
    found, swapped = _done(context, lambda calls: calls.exchange(name, expected, data, timeout))
    if as_json:
        print_json({**reading_dict(name, found), "swapped": swapped})
    elif swapped:
        click.echo(line(short_name(name), found))
    else:
        wish = None if absent else parse(values[0], kind or "")
        click.echo(f"{_not(found.value, wish, short_name(name))}  ({_of(found)})")
    return 0 if swapped else 1


def _not(found: Value | None, expected: Value | None, name: str) -> str:
    """`x is 5, not 1`; the types are told where they are what differs."""
    both = (found, expected)
    kinds = [f" ({type_of(each)})" if each is not None else "" for each in both]
    if None in both or type(found) is type(expected):
        kinds = ["", ""]
    return f"{name} is {shown(found)}{kinds[0]}, not {shown(expected)}{kinds[1]}"


def _of(reading: Reading) -> str:
    absent = reading.value is None
    return reading.strength if absent else f"version {reading.version}, {reading.strength}"


@click.command(cls=Valued)
@name_argument
@click.argument("amount", type=Text("AMOUNT"), metavar="[AMOUNT]", default="1")
@timeout_option
@json_option
@click.pass_context
def add(context: click.Context, name: str, amount: str, timeout: float, as_json: bool) -> None:
    """Add AMOUNT (1 where none is given) to the global NAME, and print what it is then.

    One that is absent counts as 0. An int stays an int, a float a float.
    """
    number = _encoded(amount, None)
    if isinstance(number, bytes):
        raise click.BadParameter(f"{amount!r} is no number.", context, param_hint="AMOUNT")
    try:
        total = _done(context, lambda calls: calls.total(name, number, timeout))
    except (TypeError, OverflowError) as error:
        raise Refused(f"{error}", "Nothing was changed: `manifold set` replaces it.") from None
    _say(name, total, as_json)


@click.command("del")
@name_argument
@timeout_option
@json_option
@click.pass_context
def del_(context: click.Context, name: str, timeout: float, as_json: bool) -> None:
    """Delete the global NAME."""
    if not _done(context, lambda calls: calls.delete(name, timeout)):
        raise _absent(name)
    if as_json:
        print_json({"name": short_name(name), "deleted": True, "strength": "quorum"})
    else:
        click.echo(f"{short_name(name)} deleted  (quorum)")
