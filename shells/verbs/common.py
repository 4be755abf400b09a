"""What verbs share: which cluster, how to print, how to show progress."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from manifold.kernel import labels
from manifold.kernel.errors import ConfigError, NoCluster
from manifold.shells.escapes import visible, visible_json, visible_text
from manifold.shells.sdk.progress import ProgressBar as ProgressBar
from manifold.shells.sdk.progress import human_ms as human_ms

F = TypeVar("F", bound=Callable[..., Any])

CLUSTER_LINE = re.compile(r"^cluster:[ ]+([a-z0-9][a-z0-9-]{0,31})[ ]*(?:#.*)?$", re.MULTILINE)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def read_labels(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    """Labels as a node has them, or a refusal that names the option."""
    try:
        return labels.read(given)
    except ConfigError as refusal:
        raise click.BadParameter(str(refusal), context, parameter) from None


label_option = click.option(
    "--label", "labels", multiple=True, metavar="KEY[=VALUE]", callback=read_labels,
    help="Beside the labels of its class, or in their place; may be given again.",
)  # fmt: skip


class Finite(click.FloatRange):
    """A number between bounds, and a number: click lets `nan` through every range."""

    def convert(self, value: Any, parameter: Any, context: Any) -> float:
        found = float(super().convert(value, parameter, context))
        if not math.isfinite(found):
            self.fail(f"{value!r} is no number to count with.", parameter, context)
        return found


def not_text(word: str) -> bool:
    """Whether an argument is not UTF-8: Python has surrogates for such bytes."""
    return any("\ud800" <= char <= "\udfff" for char in word)


def cluster_name(context: click.Context) -> str:
    """`--cluster`, else $MANIFOLD_CLUSTER, else the folder's `manifold.yaml`, else `default`."""
    root = context.find_root()
    named = (root.obj or root.params).get("cluster") or os.environ.get("MANIFOLD_CLUSTER", "")
    if named:
        return str(named)
    path = config_path("")
    if path is None:
        return "default"
    # The one line that matters, where it is as plain as it nearly always is: reading the whole
    # file takes 50 ms, which a command that only asks something need not pay.
    plain = CLUSTER_LINE.findall(path.read_text(errors="replace")) if path.is_file() else []
    if len(plain) == 1:
        return str(plain[0])
    from manifold.kernel.config import load

    return load(path, os.environ).cluster


def config_path(flag: str) -> Path | None:
    """`--config`, else $MANIFOLD_CONFIG, else the folder's `manifold.yaml`, else the packaged."""
    chosen = flag or os.environ.get("MANIFOLD_CONFIG", "")
    if chosen:
        return Path(chosen)
    here = Path("manifold.yaml")
    return here if here.is_file() else None


def connect(context: click.Context, node: str = "") -> Any:
    """A client of the cluster that the command line names."""
    from manifold.shells.sdk.client import Client

    return Client(cluster_name(context), node=node)


def print_json(value: Any) -> None:
    """JSON on one line; what JSON cannot say (NaN, infinities) becomes null."""
    import msgspec

    text = _wide_json(value) if _has_wide(value) else msgspec.json.encode(value).decode()
    sys.stdout.write(f"{visible_json(text)}\n")


def _has_wide(value: Any) -> bool:
    """Whether there is an integer beyond 64 bits, which only the standard encoder takes."""
    if isinstance(value, dict):
        return any(_has_wide(each) for each in value.values())
    return isinstance(value, int) and not -(1 << 63) <= value < 1 << 63


def _wide_json(value: Any) -> str:
    return json.dumps(value)


def for_reader(text: str) -> str:
    """What is somebody else's, for standard output: a terminal must not obey it, a pipe has it as
    it is."""
    return visible_text(text) if sys.stdout.isatty() else text


def print_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell; numbers to the right."""
    listed = [[_cell(value) for value in row] for row in rows]
    widths = [
        max([len(title), *(len(row[at]) for row in listed)]) for at, title in enumerate(titles)
    ]
    right = [bool(listed) and all(_numeric(row[at]) for row in listed) for at in range(len(titles))]
    header = "  ".join(_pad(t.upper(), w, r) for t, w, r in zip(titles, widths, right, strict=True))
    click.echo(click.style(header.rstrip(), bold=True))
    for row in listed:
        line = "  ".join(_pad(c, w, r) for c, w, r in zip(row, widths, right, strict=True))
        click.echo(line.rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None or value == "" else visible(str(value))


def _numeric(text: str) -> bool:
    return text == "-" or text.replace(".", "", 1).replace("e+", "", 1).isdigit()


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("the last unit takes everything")


def attached(context: click.Context, start: bool) -> Any:
    """A client; with `start`, of a cluster that is started first where none runs."""
    try:
        return connect(context)
    except NoCluster as error:
        if not start:
            raise NoCluster(
                error.message, "Start one with `manifold up --detach`, or add --up."
            ) from error
    # `up` lives on a floor above; it is found by name, as the table of verbs finds it.
    verbs = importlib.import_module("manifold.tools.emulator.verbs")
    click.echo(f"starting cluster {cluster_name(context)!r} (`manifold down` ends it)", err=True)
    verbs.start_detached(cluster_name(context))
    return connect(context)
