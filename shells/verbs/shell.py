"""`completion` and `version`."""

from __future__ import annotations

import platform
from importlib import metadata

import click
from click.shell_completion import get_completion_class

from manifold.shells.verbs.common import json_option, print_json
from manifold.vm.version import VERSION

# Of click's script for bash: behind a folder no blank, so that one may go on into it.
BASH_ADDS = "COMPREPLY+=($value)"
BASH_GOES_ON = "\n            [[ $value == */ ]] && compopt -o nospace"
PARTS = ("pynng", "msgspec", "wasmtime", "numpy", "cryptography", "uvloop")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print completion for SHELL; put `eval "$(manifold completion bash)"` in its start-up file."""
    kind = get_completion_class(shell)
    assert kind is not None, "click knows every shell of the choice above"
    root = context.find_root().command
    script = kind(root, {}, "manifold", "_MANIFOLD_COMPLETE").source()
    click.echo(script.replace(BASH_ADDS, BASH_ADDS + BASH_GOES_ON))


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Versions of Manifold, of Python and of what it stands on."""
    found = {"manifold": VERSION, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in PARTS}
    found["machine"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        click.echo(f"{name + ':':14}{value}")
