"""What programs that run on this node ask of globals: passed to Nexus, answered to them. Pure.

Interface rules: `call` takes what a worker asks, `answered` and `tick` what comes of it; the answer
is `Notify(GlobalAnswer(…))`. A write carries its identity, the job, the position and its number
within that position: whoever repeats it, it is done once. What Nexus cannot say yet is asked again
until the run ends, or for UNAVAILABLE_MS.
Source: design page of the scheduler, "Effects on globals".
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from manifold.kernel.effects import Effect, Notify, SetTimer
from manifold.kernel.nexus.ask import Ask
from manifold.kernel.nexus.messages import Add, Answer, ClientChange, Get, Operate, Propose, Put
from manifold.kernel.nexus.messages import Effect as GlobalEffect
from manifold.kernel.process.messages import Fault, GlobalCall, GlobalDone
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.runner import Runner
from manifold.vm.kid import Kid

TIMEOUT_MS = 5000.0  # of one request
RETRY_MS = 50.0
UNAVAILABLE_MS = 30_000.0


@dataclass(frozen=True, slots=True)
class GlobalAnswer:
    """`Notify`: for the worker of a slot."""

    slot: int
    done: GlobalDone


@dataclass(frozen=True, slots=True)
class Asked:
    slot: int
    call: GlobalCall
    since_ms: float


class GlobalCalls:
    """See the module."""

    def __init__(self, me: Kid, boot: int, runner: Runner) -> None:
        self._me = me
        self._boot = boot
        self._runner = runner
        self._token = 0
        self._asked: dict[int, Asked] = {}  # one for each slot at most, besides those of ended runs
        self._later: deque[tuple[float, Asked]] = deque()

    def call(self, slot: int, call: GlobalCall, now_ms: float) -> list[Effect]:
        return self._ask(Asked(slot, call, now_ms))

    def _ask(self, asked: Asked) -> list[Effect]:
        attempt = self._runner.running_at(asked.slot, asked.call.run)
        if attempt is None:
            return []  # it has been ended
        call, spec = asked.call, attempt.spec
        if call.op != "load" and call.name not in spec.effects:
            why = f"The job does not say that its program writes the global {call.name}."
            return _fault(asked, "refused", why, "Submit it with this release's client.")
        change: ClientChange = Get()
        if call.op != "load":
            explicit = blocks.positions(spec, call.block)[0]
            position = explicit if spec.indices else call.index - spec.lo
            settled = self._runner.settled(attempt.job)
            change = GlobalEffect(attempt.job, position, call.k, _wish(call), settled)
        self._token += 1
        self._asked[self._token] = asked
        op = f"{self._me[:18]}.e{self._boot}.{self._token}"
        request = Operate(op, f"globals/{call.name}", change, TIMEOUT_MS)
        return [Notify(Ask(self._token, request))]

    def answered(self, token: int, answer: Answer, now_ms: float) -> list[Effect]:
        asked = self._asked.pop(token, None)
        if asked is None:
            return []
        if answer.status in ("unavailable", "busy", "maybe", "rebase"):
            if now_ms - asked.since_ms < UNAVAILABLE_MS:
                self._later.append((now_ms + RETRY_MS, asked))
                return [SetTimer(self._later[0][0])]
            if answer.status == "busy":
                why = f"Too many writes of {asked.call.name} wait until their blocks are counted."
                return _fault(asked, "busy", why, "Write it less often within an index.")
            missing = ", ".join(kid[:10] for kid in answer.missing) or "not known"
            why = f"The global {asked.call.name} cannot be reached; missing voters: {missing}."
            return _fault(asked, "unavailable", why, "`manifold nexus status` lists the voters.")
        if answer.status == "refused":
            return _fault(asked, "refused", answer.why or "The effect was refused.", "")
        return self._found(asked, answer)

    def _found(self, asked: Asked, answer: Answer) -> list[Effect]:
        call = asked.call
        zero = 0.0 if call.float else 0
        found = answer.data if answer.data is not None else zero
        if call.op == "store":
            found = zero
        if type(found) is not type(zero):
            holds = {int: "an int", float: "a float", bytes: "text or bytes"}
            what = holds.get(type(found), "a lease")
            why = f"The global {call.name} holds {what}; the program declares it {_type(call)}."
            return _fault(asked, "trap", why, "Declare it with the type that it has.")
        assert isinstance(found, int | float)
        done = GlobalDone(call.run, call.number, answer.status == "ok", found)
        return [Notify(GlobalAnswer(asked.slot, done))]

    def tick(self, now_ms: float) -> list[Effect]:
        effects: list[Effect] = []
        while self._later and self._later[0][0] <= now_ms:
            effects += self._ask(self._later.popleft()[1])
        if self._later:
            effects.append(SetTimer(self._later[0][0]))
        return effects


def _wish(call: GlobalCall) -> Put | Propose | Add:
    match call.op:
        case "store":
            return Put(call.value)
        case "propose":
            return Propose(call.expected, call.value)
        case _:
            return Add(call.value)


def _type(call: GlobalCall) -> str:
    return "f64" if call.float else "i64"


def _fault(asked: Asked, code: str, message: str, next_step: str) -> list[Effect]:
    fault = Fault(code, message, next_step, index=asked.call.index)
    done = GlobalDone(asked.call.run, asked.call.number, False, 0, fault)
    return [Notify(GlobalAnswer(asked.slot, done))]
