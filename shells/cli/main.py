"""The command line: parse, find the verb, turn errors into one sentence and an exit code.

Exit codes: 0 done, 1 the work failed, 2 usage, 3 no cluster, 4 refused, 5 unknown fate.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
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
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what writing to a file may meet
SURROGATES = "surrogates not allowed"  # why CPython does not encode what was not UTF-8
SHOWN_CHARS_MAX = 80


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
    prepare_streams()
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
        sys.stdout.flush()  # here, where a full disk is an error and no traceback
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
    except UnicodeEncodeError as error:
        if error.reason != SURROGATES:
            raise  # no argument can be the cause
        said = f"{error.object[:SHOWN_CHARS_MAX]!r} is not UTF-8, as all text of a cluster is."
        return _fail("usage", said, "Rename it, or write it in UTF-8.", 2, as_json)
    except BrokenPipeError:
        return _seen_enough()
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        _forget_output()
        return _fail("cannot_write", f"Output cannot be written: {error.strerror}.",
                     "Make room, or send it elsewhere.", 1, as_json=False)  # fmt: skip


def prepare_streams() -> None:
    """Standard input, output and error are open, and take whatever is printed.

    A descriptor that is closed would be given to the next socket or file, which then is printed
    into. What an encoding lacks is shown as an escape.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _seen_enough() -> int:
    """The reader, a pager or `head`, has gone: that is no error."""
    _forget_output()
    return 0


def _forget_output() -> None:
    """What is left of it in a buffer fails no second time."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(code: str, message: str, next_step: str, exit_code: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": {"code": code, "message": message, "next": next_step}}))
    else:
        print(visible_text(f"error: {message}"), file=sys.stderr)
        if next_step:
            print(visible_text(f"  next: {next_step}"), file=sys.stderr)
    return exit_code
