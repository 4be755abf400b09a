"""`asm` and `disasm`: programs without a cluster."""

from __future__ import annotations

from pathlib import Path

import click

from manifold.shells.sdk.programs import program_of
from manifold.shells.verbs.common import json_option, print_json


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def asm(file: Path, as_json: bool) -> None:
    """Assemble and verify FILE, and say what it is."""
    program = program_of(file)
    found = {
        "kid": program.kid,
        "kind": program.kind,
        "dialect": program.dialect,
        "instructions": len(program.instructions),
        "ir_bytes": len(program.ir),
        "capabilities": sorted(program.capabilities),
    }
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        shown = ", ".join(value) or "none" if isinstance(value, list) else value
        click.echo(f"{name + ':':14}{shown}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--wat", is_flag=True, help="Show the WebAssembly text it compiles to.")
@click.option(
    "--reduce",
    "how",
    type=click.Choice(["sum", "min", "max", "count", "collect"]),
    default="collect",
    help="With --wat: the reduction it is compiled for.",
)
@json_option
def disasm(file: Path, wat: bool, how: str, as_json: bool) -> None:
    """Show the instructions of FILE, or what they compile to."""
    program = program_of(file)
    if wat:
        from manifold.vm.compile import compile_wat
        from manifold.vm.valid import verify

        text = compile_wat(verify(program), how)
    else:
        from manifold.vm.syntax import disassemble

        text = disassemble(program)
    if as_json:
        print_json({"kid": program.kid, "text": text})
    else:
        click.echo(text, nl=False)
