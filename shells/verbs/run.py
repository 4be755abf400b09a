"""`run`: programs over ranges of indices, and files that have arguments of their own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from manifold.kernel.errors import ManifoldError
from manifold.kernel.geode.messages import Demand
from manifold.shells.escapes import visible_text
from manifold.shells.sdk.placing import demand_of
from manifold.shells.sdk.progress import QUEUED, is_queued
from manifold.shells.verbs import completing
from manifold.shells.verbs.common import (
    ProgressBar,
    attached,
    human_ms,
    json_option,
    print_json,
)

SHOWN_MAX = 20  # entries of a collected result printed on a terminal
INDEX_LIMIT = 1 << 63
SECONDS_MAX = 365 * 86_400.0
PASSED = "manifold.passed"  # in a context's meta: arguments of the file that is run


class Range(click.ParamType[Any]):
    """`A:B`, half-open; underscores may group digits."""

    name = "A:B"

    def convert(self, value: Any, parameter: Any, context: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, colon, high = str(value).partition(":")
        try:
            found = int(low), int(high)
        except ValueError:
            self.fail(f"{value!r} is not a range: write A:B, such as 1:1000000.")
        if not colon or found[1] < found[0]:
            self.fail(f"the range {value} ends before it starts: A:B has A at most B.")
        if not -INDEX_LIMIT <= found[0] <= found[1] < INDEX_LIMIT:
            self.fail(f"the range {value} does not fit in 64 bits.")
        return found


class Numbers(click.ParamType[Any]):
    """Comma-separated integers and floats."""

    name = "X,Y,…"

    def convert(self, value: Any, parameter: Any, context: Any) -> tuple[int | float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(_number(part) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers: write them like 3,0.5.")


class Seconds(click.ParamType[Any]):
    """A time from 0 to a year, in seconds."""

    name = "SECONDS"

    def convert(self, value: Any, parameter: Any, context: Any) -> float:
        try:
            found = float(value)
        except ValueError:
            found = -1.0
        if not 0 <= found <= SECONDS_MAX:
            self.fail(f"{value!r} is not a time: write seconds, such as 2.5.")
        return found


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


class Runner(NamedTuple):
    """What runs files of one suffix: `module:function`, called with context, file and arguments.

    `options` are those options of `run` that mean something to it; the others are refused.
    `applies` says of a file whether it is one of these, where the suffix alone does not.
    """

    target: str
    options: tuple[str, ...]
    applies: str = ""


# Programs with arguments of their own; all others are programs over a range of indices.
RUNNERS = {
    ".py": Runner("manifold.shells.verbs.script:run_script", ("start",)),
    ".wasm": Runner(
        "manifold.shells.verbs.wasm:run_command",
        ("start", "node_class", "on_node", "gpu", "where", "timeout", "detach", "as_json"),
        "manifold.shells.verbs.wasm:is_command",
    ),
}


def _named(target: str) -> Any:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _runner(file: str) -> Runner | None:
    runner = RUNNERS.get(Path(file).suffix)
    if runner is not None and runner.applies and not _named(runner.applies)(file):
        return None
    return runner


class RunCommand(click.Command):
    """`run`, whose file may have arguments of its own."""

    def collect_usage_pieces(self, context: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(context), "[-- ARGUMENTS…]"]

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Options of ours stand before a script. One that follows it is refused, since it may be
        meant for either; behind `--` all is the script's."""
        at = self._file_at(args)
        runner = _runner(args[at]) if at < len(args) else None
        if runner is None:
            return super().parse_args(context, args)
        file, passed = args[at], args[at + 1 :]
        end = passed.index("--") if "--" in passed else len(passed)
        for word in passed[:end]:
            self._refuse_behind(context, file, word, runner)
        context.meta[PASSED] = [*passed[:end], *passed[end + 1 :]]
        rest = super().parse_args(context, args[: at + 1])
        for each in self.params:
            given = context.get_parameter_source(each.name or "") is ParameterSource.COMMANDLINE
            if given and each.name not in ("file", *runner.options):
                raise click.UsageError(
                    f"{each.opts[0]} is for programs over indices, and {file} is none. To pass it "
                    f"to {file}, write it behind two dashes: manifold run {file} -- {each.opts[0]}",
                    context,
                )
        return rest

    def _options(self) -> dict[str, click.Option]:
        options = [each for each in self.params if isinstance(each, click.Option)]
        return {name: each for each in options for name in each.opts}

    def _file_at(self, args: list[str]) -> int:
        """Where the file stands: the first word that is neither an option nor an option's value."""
        options = self._options()
        at = 0
        while at < len(args) and args[at].startswith("-"):
            name, equals, _ = args[at].partition("=")
            option = options.get(name)
            at += 1 if equals or option is None or option.is_flag else 2
        return at

    def _refuse_behind(self, context: click.Context, file: str, word: str, runner: Runner) -> None:
        name = word.partition("=")[0]
        option = self._options().get(name)
        if option is None:
            return
        ours = option.name in runner.options
        what = "" if ours else " for programs over indices"
        before = f" Write it before the file, manifold run {name} {file}." if ours else ""
        raise click.UsageError(
            f"{name} is an option of manifold run{what}.{before} To pass it to {file}, write it "
            f"behind two dashes: manifold run {file} -- {word}",
            context,
        )


@click.command(cls=RunCommand)
@click.argument("file")
@click.option("--range", "span", type=Range(), default="0:1", help="Indices, half-open.")
@click.option(
    "--reduce",
    "how",
    type=click.Choice(["sum", "min", "max", "count", "collect"]),
    default="collect",
    show_default=True,
)
@click.option("--entry", default="", metavar="NAME", help="Of a .wasm module: what to call.")
@click.option("--args", "arguments", type=Numbers(), default="", help="Cells after the index.")
@click.option("--timeout", type=Seconds(), default=0.0, help="Seconds; 0 is none.")
@click.option("--class", "node_class", default="", help="Only on nodes of this class.")
@click.option(
    "--on", "on_node", default="", metavar="NODE", help="Only on this node.",
    shell_complete=completing.aliases,
)  # fmt: skip
@click.option("--gpu", is_flag=True, help="Only on nodes with a GPU.")
@click.option(
    "--where", multiple=True, metavar="LABEL",
    help="Only on nodes with this label: site=a, ssd, '!ssd'; may be given again.",
)  # fmt: skip
@click.option("--why", "explain", is_flag=True, help="Then say how each shard was placed.")
@click.option("--detach", is_flag=True, help="Print the job's id and do not wait.")
@click.option("--up", "start", is_flag=True, help="Start a cluster first where none runs.")
@json_option
@click.pass_context
def run(
    context: click.Context,
    file: str,
    span: tuple[int, int],
    how: Any,
    entry: str,
    arguments: tuple[int | float, ...],
    timeout: float,
    node_class: str,
    on_node: str,
    gpu: bool,
    where: tuple[str, ...],
    explain: bool,
    detach: bool,
    start: bool,
    as_json: bool,
) -> int:
    """Run FILE: a program over a range of indices (.ent, .json, .wasm), a WASI program (.wasm), or
    a Python script (.py).

    A script runs as `python FILE` does, and `manifold.connect()` in it finds the cluster; where
    none runs, one is started that ends with it. What follows a script or a WASI program is passed
    to it.
    """
    if PASSED in context.meta:
        runner = RUNNERS[Path(file).suffix]
        return int(_named(runner.target)(context, file, context.meta[PASSED]))
    from manifold.shells.sdk.programs import name_of

    demand = demand_of(Demand(node_class=node_class, node=on_node, needs_gpu=gpu), where)
    options: dict[str, Any] = {
        "reduce": how, "arguments": arguments, "timeout_ms": timeout * 1000, "demand": demand,
        "name": name_of(file), "detach": detach,
    }  # fmt: skip
    start_job = _starter(file, span, entry, options)
    with attached(context, start) as client:
        future = start_job(client)
        if detach:
            while future.status is None and not future.done():
                client.status(future.job)
            print_json({"job": future.job}) if as_json else click.echo(future.job)
            if is_queued(future):
                click.echo(QUEUED.format(job=future.job), err=True)
            return 0
        bar = ProgressBar()
        try:
            result = client.wait(future, bar)
        except ManifoldError as error:
            bar.clear()
            _explain_trap(error, as_json)
            raise
        finally:
            bar.clear()
        decisions = client.why(future.job) if explain else ()
    _show(future, result, decisions, as_json)
    return 0


def _starter(
    file: str, span: tuple[int, int], entry: str, options: dict[str, Any]
) -> Callable[[Any], Any]:
    """How a client starts FILE; what is wrong with it is said before anybody is asked."""
    if Path(file).suffix == ".wasm":
        from manifold.shells.sdk.wasm import foreign_of

        foreign_of(Path(file)).entry(entry)
        return lambda client: client.module(file, *span, entry=entry, **options)
    if entry:
        raise click.UsageError(f"--entry is for .wasm modules, and {file} is none.")
    from manifold.shells.sdk.programs import program_of

    program = program_of(Path(file))
    return lambda client: client.job(program, *span, **options)


def _explain_trap(error: ManifoldError, as_json: bool) -> None:
    cells = getattr(error, "cells", ())
    if cells and not as_json:
        shown = ", ".join(f"{n}: {value}" for n, value in enumerate(cells[:16]))
        click.echo(f"cells: {shown}", err=True)


def _show(future: Any, result: Any, decisions: Any, as_json: bool) -> None:
    status = future.status
    if as_json:
        found = {
            "job": future.job,
            "state": "done",
            "result": result,
            "indices": status.total,
            "elapsed_ms": round(status.elapsed_ms, 3),
            "shards": status.shards,
            "retries": status.retries,
        }
        if decisions:
            found["why"] = [decision.to_dict() for decision in decisions]
        print_json(found)
        return
    if isinstance(result, list):
        shown = result if not sys.stdout.isatty() else result[:SHOWN_MAX]
        for entry in shown:
            click.echo(entry if not isinstance(entry, list) else " ".join(map(str, entry)))
        if len(shown) < len(result):
            click.echo(f"… and {len(result) - len(shown):,} more (`--json`, or a pipe, has all)")
    else:
        click.echo(result)
    click.echo(
        f"{future.job}: {status.total:,} indices in {human_ms(status.elapsed_ms)}, "
        f"{status.shards} shards, {status.retries} retries",
        err=True,
    )
    for decision in decisions:
        click.echo(visible_text(decision.text()))
