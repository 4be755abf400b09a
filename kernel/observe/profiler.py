"""A profile of this process, by looking at its threads many times a second, while it goes on.

Interface rules: `Profiler(…).start()` begins a thread of its own, the only one that exists for this
and only for that long; `done` is called in that thread with the stacks, once, also after `stop`.
What a thread does in C belongs to the Python function that called it. Beneath it stands `(waits)`
where the thread did not run at all since the sample before, and `(event loop)` where there is no
Python function but the loop's own: it polls, reads or writes. What starts every stack is left out.
Bounds: STACKS_MAX distinct stacks of FRAMES_MAX frames. Source: Brendan Gregg, "The Flame Graph"
(folded stacks); sampling as py-spy does it, from within.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType

from manifold.kernel.observe.messages import (
    LOOP,
    MAIN,
    STACK_CHARACTERS_MAX,
    STACKS_MAX,
    WAITS,
    Stack,
)

FRAMES_MAX = 64  # the innermost are kept
CODES_MAX = 20_000  # functions whose names are remembered; a node has 6 000 in all
THREAD = "manifold-profiler"
OTHER = "(other)"
OURS = "manifold."
STARTS = ("asyncio.runners.Runner.run", "threading.Thread.run")  # up to here every stack is alike


@dataclass(frozen=True, slots=True)
class Found:
    """What a profile came to."""

    seconds: float
    samples: int
    cpu_s: float
    stacks: tuple[Stack, ...]  # the most frequent first
    truncated: int


class Profiler:
    """See the module."""

    def __init__(self, seconds: float, hz: int, done: Callable[[Found], None]) -> None:
        self._seconds, self._hz, self._done = seconds, hz, done
        self._stop = threading.Event()
        self._counts: Counter[tuple[str, bool, tuple[int, ...]]] = Counter()
        self._ran_ns: dict[int, int] = {}  # by thread
        self._codes: dict[int, tuple[CodeType, str]] = {}  # held, so that no id is used again
        self._samples = self._truncated = 0
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it early."""
        self._stop.set()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        begun_s, used_s = time.perf_counter(), time.process_time()
        me = threading.get_ident()
        for thread in threading.enumerate():
            self._waits(thread.native_id or 0)
        end_s, next_s = begun_s + self._seconds, begun_s
        while (now_s := time.perf_counter()) < end_s:
            next_s += 1 / self._hz
            if next_s <= now_s:  # what was missed while others had the processor is not made up for
                next_s = now_s + 1 / self._hz
            if self._stop.wait(min(next_s, end_s) - now_s):
                break
            self.sample(me)
        seconds, used_s = time.perf_counter() - begun_s, time.process_time() - used_s
        self._done(Found(seconds, self._samples, used_s, self.stacks(), self._truncated))

    def sample(self, skip: int = 0) -> None:
        """Look once at every thread but `skip`."""
        threads = {thread.ident: thread for thread in threading.enumerate()}
        self._samples += 1
        for ident, frame in sys._current_frames().items():
            if ident != skip:
                thread = threads.get(ident)
                waits = thread is not None and self._waits(thread.native_id or 0)
                self._count(thread.name if thread is not None else "thread", waits, frame)

    def _waits(self, native: int) -> bool:
        """Whether a thread has not run since the last look at it."""
        try:
            with open(f"/proc/self/task/{native}/schedstat") as file:
                ran_ns = int(file.read().split()[0])
        except OSError:  # it has ended, or this kernel does not tell
            return False
        before_ns, self._ran_ns[native] = self._ran_ns.get(native), ran_ns
        return before_ns == ran_ns

    def _count(self, thread: str, waits: bool, frame: FrameType | None) -> None:
        codes: list[int] = []
        while frame is not None and len(codes) < FRAMES_MAX:
            codes.append(self._known(frame.f_code))
            frame = frame.f_back
        key = (thread, waits, tuple(codes))
        if key in self._counts or len(self._counts) < STACKS_MAX:
            self._counts[key] += 1
        else:
            self._truncated += 1

    def _known(self, code: CodeType) -> int:
        number = id(code)
        if number not in self._codes:
            if len(self._codes) >= CODES_MAX:
                return 0
            self._codes[number] = (code, name_of(code))
        return number

    def stacks(self) -> tuple[Stack, ...]:
        """All that was seen, the most frequent first."""
        found: Counter[str] = Counter()
        for (thread, waits, codes), count in self._counts.items():
            names = [self._codes[code][1] if code else OTHER for code in reversed(codes)]
            start = next((name for name in STARTS if name in names), "")
            names = names[names.index(start) + 1 :] if start else names
            if not names and thread == MAIN:
                names = [LOOP]
            elif waits:
                names.append(WAITS)
            folded = ";".join((thread.replace(";", ","), *names))
            found[folded[:STACK_CHARACTERS_MAX]] += count
        if self._truncated:
            found[OTHER] += self._truncated
        return tuple(Stack(frames, count) for frames, count in found.most_common())


def name_of(code: CodeType) -> str:
    """`module.Class.function`, without the `manifold.` of what is ours."""
    path = code.co_filename
    for root in sorted(sys.path, key=len, reverse=True):
        if root and path.startswith(root + "/"):
            path = path[len(root) + 1 :]
            break
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    name = f"{module.removeprefix(OURS)}.{code.co_qualname}"
    return name.replace(";", ",").replace("\n", " ")
