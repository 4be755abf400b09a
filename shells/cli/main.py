"""The command line: parse, find the verb, turn errors into one sentence and an exit code.

Exit codes: 0 done, 1 the work failed, 2 usage, 3 no cluster, 4 refused, 5 unknown fate.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import platform
import sys
from typing import Any

import click

from manifold.shells.cli.table import GROUPS, VERBS
from manifold.shells.escapes import visible_text
from manifold.vm.errors import ManifoldError

INTERRUPTED = 130  # as shells say it: 128 + SIGINT


class Verbs(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        entry = VERBS.get(name)
        if entry is None:
            return None
        module, _, attribute = entry[0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
            near = difflib.get_close_matches(arguments[0], VERBS, n=1, cutoff=0.5)
            hint = f"Did you mean `manifold {near[0]}`?" if near else "`manifold --help` lists all."
            raise click.UsageError(f"There is no verb {arguments[0]!r}. {hint}")
        return super().resolve_command(context, arguments)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError:  # here, since click itself would exit with 1
            return _seen_enough()

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for title, verbs in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, line) for name, (_, line) in verbs.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cluster", metavar="NAME", default="", help="Which cluster (or $MANIFOLD_CLUSTER).")
@click.pass_context
def manifold(context: click.Context, cluster: str) -> None:
    """One operating system over unequal machines."""
    context.obj = {"cluster": cluster}


def supported() -> str:
    """Why this machine is not supported, or "" where it is."""
    if platform.system() != "Linux":
        return (
            f"Manifold runs on Linux (x86-64 or arm64); this is {platform.system()}. "
            "Use a Linux machine, a virtual machine or WSL 2."
        )
    return ""


def main() -> None:
    """The console script."""
    unsupported = supported()
    if unsupported:
        print(f"error: {unsupported}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; its exit code."""
    as_json = "--json" in arguments
    try:
        result: Any = manifold.main(args=arguments, prog_name="manifold", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except ManifoldError as error:
        return _fail(error.code, error.message, error.next_step, error.exit_code, as_json)
    except click.UsageError as error:
        if error.ctx is not None and not as_json:
            click.echo(error.ctx.get_usage(), err=True)
        return _fail("usage", error.format_message(), "", 2, as_json)
    except click.ClickException as error:
        return _fail("usage", error.format_message(), "", 2, as_json)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _seen_enough() -> int:
    """The reader, a pager or `head`, has gone: that is no error."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(code: str, message: str, next_step: str, exit_code: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": {"code": code, "message": message, "next": next_step}}))
    else:
        print(visible_text(f"error: {message}"), file=sys.stderr)
        if next_step:
            print(visible_text(f"  next: {next_step}"), file=sys.stderr)
    return exit_code
