"""Changing who votes: from one set of voters to another by sealed joint quorums.

Interface: `initialise(kids, …)` once for a new cluster; `change(kids, …)`; `look()` finds a change
that somebody else left half done and finishes it. Any node drives, several may at a time. A change
that names the epoch it was computed from is refused where another configuration has become final.

The journal is the config register: e (final) -> e+1 (joint) -> e+2 (final), each step by a
compare-and-swap of its version, so of two drivers one wins each step and the other goes on from
there. Steps: read the register; greet who is new; write e+1; seal it at a majority of the old and
of the new ones; install the highest floors at a majority of the new ones; propose every key again
by joint quorum, the config register among them; write e+2; seal it at a majority of the new ones.
Who only finds a change takes turns (`_our_turn`); who was asked for one drives at once.
Invariants:
  R1  a configuration is sealed only once it is chosen in the register;
  R2  e+2 is written only after every key that a quorum of e may have chosen was written by a joint
      quorum, after e+1 was sealed: no quorum of e can form any more.
Source: design page of Nexus, membership; Lamport, Malkhi, Zhou, "Reconfiguring a State Machine".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from manifold.kernel.nexus.ballots import ZERO, Ballot
from manifold.kernel.nexus.configs import Config, Voter, final_epoch, first_config, majority
from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.messages import (
    CONFIG_KEY,
    SHARDS,
    Greeting,
    Hello,
    Scan,
    Scanned,
    Seal,
    Sealed,
)
from manifold.kernel.nexus.proposer import Proposer
from manifold.kernel.nexus.rounds import Operation
from manifold.kernel.nexus.values import CasVersion, Change, Get, Result, Rewrite
from manifold.vm.kid import Kid

STEP_MS = 2000.0  # an operation of the driver's own
WINDOW = 32  # keys written again at a time
LATE = "Not in time; who votes will find it half done and go on."
OVERTAKEN = "The voters have changed since: look at them again, then say what you want."

Finish = Callable[[str, str, tuple[Kid, ...]], None]  # status, why, who did not answer
_config = msgspec.msgpack.Decoder(Config)


@dataclass(slots=True)
class Drive:
    """One drive; `heard` collects the answers of the present step."""

    target: tuple[Kid, ...] | None  # None: finish what is half done
    deadline_ms: float
    finish: Finish
    first: bool = False
    epoch: int = -1  # of the final configuration that the change was computed from, if it matters
    step: str = "read"
    rid: int = 0
    config: Config | None = None  # the one being sealed
    version: int = 0
    floors: tuple[Ballot, ...] = (ZERO,) * SHARDS
    heard: dict[Kid, Greeting | Sealed | Scanned] = field(default_factory=dict)
    after: str = ""
    keys: list[str] = field(default_factory=list)
    writing: int = 0
    page_last: bool = False
    over: bool = False


class Drivers:
    """This node as driver: one drive at a time."""

    def __init__(
        self, context: Context, proposer: Proposer, live: Callable[[], Sequence[Kid]]
    ) -> None:
        self._context = context
        self._proposer = proposer
        self._live = live
        self.drive: Drive | None = None
        self._seen = (-1, 0.0)  # the epoch of the joint configuration found last, and when

    # -- what begins a drive ----------------------------------------------------------------------

    def initialise(self, kids: Sequence[Kid], timeout_ms: float, finish: Finish) -> None:
        self._begin(Drive(tuple(kids), self._until(timeout_ms), finish, first=True, step="hello"))

    def change(
        self, kids: Sequence[Kid], timeout_ms: float, finish: Finish, epoch: int = -1
    ) -> None:
        """`epoch` of a joint configuration stands for the final one that it leads to."""
        base = final_epoch(epoch) if epoch >= 0 else -1
        self._begin(Drive(tuple(kids), self._until(timeout_ms), finish, epoch=base))

    def look(self) -> None:
        """Read the register; a joint configuration means that somebody did not come to an end."""
        if self.drive is None and self._proposer.config is not None:
            quiet: Finish = lambda status, why, missing: None  # noqa: E731
            self._begin(Drive(None, self._until(5 * STEP_MS), quiet))

    def adopted(self, config: Config) -> None:
        """Somebody else has come further: nobody answers the step that we are at any more."""
        drive = self.drive
        if drive is None or drive.config is None or drive.step in ("read", "write"):
            return
        if config.epoch > drive.config.epoch:
            self._again(drive)

    def _our_turn(self, config: Config) -> bool:
        """Whether we go on with a joint configuration that somebody did not bring to an end.

        The first of its live voters does so at once, the next one after `resume_ms`, then 3 and 7
        times as long; who has no vote comes last. If all did so at once, each would write every
        key again against all others: on a host that is overloaded none would come to an end.
        """
        now_ms = self._context.now_ms
        if self._seen[0] != config.epoch:
            self._seen = (config.epoch, now_ms)
        live = self._live()
        first = [kid for kid in sorted(config.kids()) if kid in live or kid == self._context.me]
        me = self._context.me
        rank = first.index(me) if me in first else len(first)
        return now_ms - self._seen[1] >= self._context.timing.resume_ms * ((1 << rank) - 1)

    def _until(self, timeout_ms: float) -> float:
        return self._context.now_ms + timeout_ms

    def _begin(self, drive: Drive) -> None:
        if drive.target is not None and not drive.target:
            drive.finish("refused", "There must be at least one voter.", ())
            return
        if self.drive is not None:
            if self.drive.target is not None:
                drive.finish("busy", "This node changes the voters already.", ())
                return
            self._end(self.drive, "ok", "")
        self.drive = drive
        self._enter(drive, drive.step)

    # -- steps ------------------------------------------------------------------------------------

    def _enter(self, drive: Drive, step: str) -> None:
        """Begin a step: say what it says, and say it again until it is answered."""
        if drive.over:
            return
        drive.step = step
        drive.heard.clear()
        drive.rid = self._context.rid()
        if step == "read":
            self._submit(CONFIG_KEY, Get(), lambda result: self._journal(drive, result))
            return
        self._say(drive, drive.rid)

    def _say(self, drive: Drive, rid: int) -> None:
        if drive.over or drive.rid != rid or drive.step in ("read", "write"):
            return
        silent = tuple(kid for kid in self._audience(drive) if kid not in drive.heard)
        if self._context.now_ms >= drive.deadline_ms:
            self._end(drive, "maybe", LATE, silent)
            return
        for kid in silent:
            self._context.send(kid, self._words(drive))
        self._context.later(self._context.timeout_ms(), lambda _now: self._say(drive, rid))

    def _audience(self, drive: Drive) -> tuple[Kid, ...]:
        if drive.step == "hello":
            assert drive.target is not None
            return drive.target
        assert drive.config is not None
        return drive.config.kids()

    def _words(self, drive: Drive) -> Hello | Seal | Scan:
        if drive.step == "hello":
            return Hello(drive.rid)
        assert drive.config is not None
        if drive.step == "scan":
            return Scan(drive.rid, drive.config.epoch, drive.after)
        return Seal(drive.rid, drive.config, drive.floors if drive.step == "floors" else ())

    def _submit(self, key: str, wish: Change, done: Callable[[Result], None]) -> None:
        op = f"{self._context.me[:18]}.{self._context.nonce}.{self._context.rid()}"
        deadline_ms = self._context.now_ms + STEP_MS
        self._proposer.submit(Operation(op, key, wish, deadline_ms, done))

    def _journal(self, drive: Drive, result: Result) -> None:
        """What the register says decides how to go on."""
        if drive.over:
            return
        if result.status != "ok":
            self._again(drive, result)
            return
        drive.version = result.version if result.data is not None else 0
        known = self._proposer.config
        assert known is not None, "it was read with one"
        config = _config.decode(result.data) if isinstance(result.data, bytes) else known
        if result.data is None and known.count != 1:
            self._again(drive)  # read by an epoch that is over
            return
        self._proposer.adopt(config)
        drive.config = config
        if self._overtaken(drive, config):
            self._end(drive, "refused", OVERTAKEN)
        elif drive.target is None and config.joint and not self._our_turn(config):
            self._end(drive, "ok", "")
        elif config.joint or (drive.target is None and result.data is not None):
            self._enter(drive, "seal")
        elif drive.target is None:
            self._end(drive, "ok", "")
        elif sorted(drive.target) == sorted(config.kids()):
            self._enter(drive, "seal")
        else:
            self._enter(drive, "hello")

    @staticmethod
    def _overtaken(drive: Drive, config: Config) -> bool:
        """Whether somebody else's change came between; one to the same voters is as good as ours.

        While joint, only a change away from the configuration that was named is ours.
        """
        if drive.epoch < 0 or drive.target is None:
            return False
        wanted = sorted(drive.target) == sorted(voter.kid for voter in config.new)
        return not wanted and final_epoch(config.epoch) != drive.epoch

    def _again(self, drive: Drive, result: Result | None = None) -> None:
        if self._context.now_ms >= drive.deadline_ms:
            missing = tuple(Kid(kid) for kid in result.missing) if result is not None else ()
            self._end(drive, "maybe", LATE, missing)
            return
        drive.step = "read"
        drive.rid = rid = self._context.rid()
        wait_ms = self._context.random.random() * self._context.timeout_ms()

        def later(_now_ms: float) -> None:
            if drive.rid == rid:
                self._enter(drive, "read")

        self._context.later(wait_ms, later)

    def _end(self, drive: Drive, status: str, why: str, missing: tuple[Kid, ...] = ()) -> None:
        drive.over = True
        if self.drive is drive:
            self.drive = None
        drive.finish(status, why, missing)

    # -- answers ----------------------------------------------------------------------------------

    def receive(self, source: Kid, message: Greeting | Sealed | Scanned) -> None:
        drive = self.drive
        if drive is None or message.rid != drive.rid or source not in self._audience(drive):
            return
        match message:
            case Greeting() if drive.step == "hello":
                drive.heard[source] = message
                self._greeted(drive)
            case Sealed() if drive.step in ("seal", "floors"):
                assert drive.config is not None
                if message.epoch == drive.config.epoch:
                    drive.heard[source] = message
                    self._sealed(drive)
            case Scanned() if drive.step == "scan":
                drive.heard[source] = message
                self._scanned(drive)
            case _:
                return

    def _greeted(self, drive: Drive) -> None:
        assert drive.target is not None
        if len(drive.heard) < len(drive.target):
            return
        greetings = {k: g for k, g in drive.heard.items() if isinstance(g, Greeting)}
        voters = [Voter(kid, greetings[kid].disk) for kid in drive.target]
        if drive.first:
            self._found(drive, voters, greetings)
            return
        assert drive.config is not None
        listed = {voter.kid: voter.disk for voter in drive.config.new}
        for voter in voters:
            if listed.get(voter.kid, voter.disk) != voter.disk:
                self._end(
                    drive,
                    "refused",
                    f"{voter.kid} has lost its disk: remove it first, then add it anew.",
                )
                return
        self._write(drive, drive.config.toward(voters))

    def _found(self, drive: Drive, voters: list[Voter], greetings: dict[Kid, Greeting]) -> None:
        """The first configuration, or what an earlier attempt has made."""
        config = first_config(voters)
        known = [each.config for each in greetings.values() if each.config is not None]
        if any(each.origin != config.origin for each in known):
            self._end(drive, "refused", "One of these votes in a cluster already.")
            return
        newest = max((each.epoch for each in known), default=0)
        if newest > config.epoch:
            drive.target = None
            self._proposer.adopt(max(known, key=lambda each: each.epoch))
            self._enter(drive, "read")
            return
        drive.config = config
        self._enter(drive, "seal")

    def _write(self, drive: Drive, config: Config) -> None:
        """Journal the next step; whatever comes of it is then read from the register (R1)."""
        drive.step = "write"
        drive.rid = self._context.rid()
        data = msgspec.msgpack.encode(config)
        self._submit(
            CONFIG_KEY, CasVersion(drive.version, data), lambda result: self._again(drive, result)
        )

    def _sealed(self, drive: Drive) -> None:
        config, heard = drive.config, drive.heard
        assert config is not None
        if drive.first:  # all of them: two first sets that share a voter cannot both come about
            if len(heard) == len(config.new):
                self._proposer.adopt(config)
                self._end(drive, "ok", "")
            return
        if not config.quorum(heard):
            return
        floors = [each.floors for each in heard.values() if isinstance(each, Sealed)]
        if not config.joint:
            self._settled(drive)
        elif drive.step == "seal":
            drive.floors = tuple(max(column) for column in zip(*floors, strict=True))
            self._enter(drive, "floors")
        else:
            high = {
                kid: None
                for kid, each in heard.items()
                if isinstance(each, Sealed)
                and all(a >= b for a, b in zip(each.floors, drive.floors, strict=True))
            }
            if majority(config.new, high):
                drive.after = ""
                self._enter(drive, "scan")

    def _settled(self, drive: Drive) -> None:
        """A final configuration is sealed: done, or the change that was asked for can begin."""
        assert drive.config is not None
        if drive.target is None or sorted(drive.target) == sorted(drive.config.kids()):
            self._end(drive, "ok", "")
        else:
            self._enter(drive, "hello")

    # -- writing every key again ------------------------------------------------------------------

    def _scanned(self, drive: Drive) -> None:
        """One page: all keys up to the least last key of the pages that are not the last ones."""
        assert drive.config is not None
        if not drive.config.quorum(drive.heard):
            return
        pages = [page for page in drive.heard.values() if isinstance(page, Scanned)]
        ends = [page.keys[-1] for page in pages if not page.last and page.keys]
        drive.page_last = not ends
        until = min(ends, default="")
        union = {key: None for page in pages for key in page.keys if not ends or key <= until}
        drive.keys = sorted(union)
        drive.after = until
        drive.step, drive.rid = "write", self._context.rid()
        drive.writing = 0
        self._rewrite(drive)

    def _rewrite(self, drive: Drive) -> None:
        while drive.keys and drive.writing < WINDOW:
            key = drive.keys.pop()
            drive.writing += 1
            self._submit(key, Rewrite(), lambda result, key=key: self._wrote(drive, key, result))  # type: ignore[misc]
        if drive.writing:
            return
        if drive.page_last:
            assert drive.config is not None
            config = drive.config
            self._submit(CONFIG_KEY, Get(), lambda result: self._written(drive, config, result))
        else:
            self._enter(drive, "scan")

    def _wrote(self, drive: Drive, key: str, result: Result) -> None:
        drive.writing -= 1
        if drive.over:
            return
        assert drive.config is not None
        known = self._proposer.config
        if known != drive.config:  # somebody else has gone further
            drive.keys.clear()
            if not drive.writing:
                self._again(drive)
            return
        if result.status != "ok":
            if self._context.now_ms >= drive.deadline_ms:
                missing = tuple(Kid(kid) for kid in result.missing)
                self._end(drive, "maybe", LATE, missing)
                return
            drive.keys.insert(0, key)
        self._rewrite(drive)

    def _written(self, drive: Drive, config: Config, result: Result) -> None:
        """R2: every key is written; end the change if the register still says so."""
        if drive.over:
            return
        if result.status == "ok" and isinstance(result.data, bytes):
            drive.version = result.version
            if _config.decode(result.data) == config:
                self._write(drive, config.settled())
                return
        self._again(drive, result)
