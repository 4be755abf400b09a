"""WebAssembly programs of other compilers, as a client submits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from manifold.kernel.errors import InvalidProgram, ManifoldError
from manifold.kernel.geode.messages import Demand
from manifold.kernel.hyperbus.faults import to_error
from manifold.kernel.hyperbus.messages import Failure
from manifold.kernel.process.messages import Value
from manifold.kernel.scheduler.messages import JobSpec, JobStatus, Reduction
from manifold.kernel.tasks.messages import STDIN_BYTES_MAX, CommandLine, CommandOutput, Parcel
from manifold.shells.sdk.future import Future, cancel_here, error_of, settle
from manifold.shells.sdk.jobs import Awaited, Job
from manifold.shells.sdk.placing import Where, demand_of
from manifold.shells.sdk.programs import name_of
from manifold.vm.foreign import PROGRAM_BYTES_MAX, Foreign, load

_outputs = msgspec.msgpack.Decoder(CommandOutput)


@dataclass(frozen=True, slots=True)
class Finished:
    """How a WASI program ended: its exit status, and what it wrote."""

    status: int
    stdout: bytes
    stderr: bytes


def foreign_of(path: Path) -> Foreign:
    """The program in a file; `InvalidProgram` says what is wrong with it."""
    try:
        size = path.stat().st_size
        if size > PROGRAM_BYTES_MAX:
            raise InvalidProgram(
                f"{path} has {size} bytes; a program has at most {PROGRAM_BYTES_MAX}.",
                "Compile it with -Oz and link it with -Wl,--strip-all.",
            )
        return load(path.read_bytes(), name_of(path.name))
    except OSError as error:
        raise InvalidProgram(
            f"{path} cannot be read: {error.strerror}.", "Check the path."
        ) from error


def module_spec(
    module: Foreign,
    lo: int,
    hi: int,
    *,
    entry: str = "",
    reduce: Reduction = "collect",
    arguments: Sequence[int | float] = (),
    timeout_ms: float = 0.0,
    demand: Demand | None = None,
    where: Where = (),
    name: str = "",
) -> JobSpec:
    """An exported function over a range of indices; refused here where a node would."""
    from manifold.vm.foreign.machine import check_arguments

    check_arguments(module.name, module.entry(entry), arguments)
    return JobSpec(
        module.kid, lo, hi, reduce, tuple(arguments), False, (), timeout_ms, name or module.name,
        demand_of(demand, where), "wasm", False, entry,
    )  # fmt: skip


def command_job(
    command: Foreign,
    arguments: Sequence[str],
    future: Future,
    *,
    stdin: bytes = b"",
    environ: Mapping[str, str] | None = None,
    timeout_ms: float = 0.0,
    demand: Demand | None = None,
    detach: bool = False,
) -> Job:
    """One run of a WASI program with `arguments`, the first being its name for itself."""
    if len(stdin) > STDIN_BYTES_MAX:
        raise InvalidProgram(
            f"Standard input has {len(stdin)} bytes; a program is given {STDIN_BYTES_MAX} at most.",
            "Cut it in parts and run one for each.",
        )
    spec = JobSpec(
        command.kid, 0, 1, "collect", (), True, (), timeout_ms, command.name,
        demand or Demand(), "wasm",
    )  # fmt: skip
    line = CommandLine(tuple(arguments), dict(environ or {}), stdin)
    parcel = Parcel(msgspec.msgpack.encode(line))
    return Job(spec, command.data, _Command(future), parcels=(parcel,), detach=detach)


class _Command(Awaited):
    """A future for one run."""

    def __init__(self, future: Future) -> None:
        self._future = future

    def progress(self, status: JobStatus) -> None:
        self._future.status = status

    def some(self, first: int, results: Sequence[Any]) -> None:
        for result in results:
            if isinstance(result, Value):
                self._settle(_outputs.decode(result.parcel.data))
            else:
                self.failed(error_of(result, self._future.status))

    def _settle(self, output: CommandOutput) -> None:
        if not output.code:
            done = Finished(output.status, output.stdout, output.stderr)
            settle(self._future, lambda: self._future.set_result(done))
            return
        status = self._future.status
        message = output.message
        if status is not None and status.name:
            message = message.replace(status.program, status.name)
        error = to_error(Failure(output.code, message, output.next_step))
        self.failed(with_output(error, output))

    def done(self, status: JobStatus, first: int, results: Sequence[Any]) -> None:
        self.some(first, results)

    def failed(self, error: BaseException) -> None:
        settle(self._future, lambda: self._future.set_exception(error))

    def cancelled(self) -> None:
        cancel_here(self._future)


def with_output(error: ManifoldError, output: CommandOutput) -> ManifoldError:
    """The error of a program, with what it had written: `stdout` and `stderr`."""
    vars(error).update(stdout=output.stdout, stderr=output.stderr)
    return error
