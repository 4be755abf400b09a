"""A profile says where threads were, and stays within its bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from manifold.kernel.observe import profiler
from manifold.kernel.observe.messages import STACK_CHARACTERS_MAX, WAITS
from manifold.kernel.observe.profiler import Found, Profiler, name_of
from manifold.kernel.observe.render import render


def spin_here(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(range(100))


def wait_here(stop: threading.Event) -> None:
    stop.wait()


def profiled(work: Callable[[threading.Event], None], seconds: float = 0.5) -> Found:
    """A profile of this process while a thread named `subject` does `work`."""
    stop, found = threading.Event(), []
    subject = threading.Thread(target=work, args=(stop,), name="subject")
    subject.start()
    try:
        taken = Profiler(seconds, 200, found.append)
        taken.start()
        taken.join()
    finally:
        stop.set()
        subject.join()
    return found[0]


def of(found: Found, name: str) -> dict[str, int]:
    return {s.frames: s.count for s in found.stacks if s.frames.startswith(name + ";")}


def test_a_busy_function_is_found_and_one_that_waits_is_told_from_it() -> None:
    busy, idle = profiled(spin_here), profiled(wait_here)
    spinning = of(busy, "subject")
    at_work = sum(n for frames, n in spinning.items() if "spin_here" in frames)
    assert at_work >= 0.9 * sum(spinning.values()) > 0
    assert sum(n for frames, n in spinning.items() if frames.endswith(WAITS)) < at_work / 2
    waiting = of(idle, "subject")
    assert max(waiting, key=waiting.__getitem__).endswith(
        f"threading.Event.wait;threading.Condition.wait;{WAITS}"
    )
    assert busy.cpu_s > idle.cpu_s


def test_the_profiler_itself_is_in_no_profile_and_ends_with_it() -> None:
    found = profiled(wait_here)
    assert not any(profiler.THREAD in stack.frames for stack in found.stacks)
    assert all(thread.name != profiler.THREAD for thread in threading.enumerate())
    assert 0.4 < found.seconds < 5
    assert 0 < found.samples <= 0.5 * 200 + 1


def test_it_can_be_ended_early() -> None:
    found: list[Found] = []
    taken = Profiler(60.0, 100, found.append)
    taken.start()
    taken.stop()
    taken.join()
    assert found[0].seconds < 10


def test_stacks_beyond_the_bound_are_counted_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "STACKS_MAX", 1)

    def deeper(depth: int, taken: Profiler) -> None:
        taken.sample()
        if depth:
            deeper(depth - 1, taken)

    taken = Profiler(1.0, 100, lambda _: None)
    deeper(5, taken)
    stacks = taken.stacks()
    assert len(stacks) == 2
    assert {s.frames: s.count for s in stacks}[profiler.OTHER] >= 5


def test_a_stack_keeps_its_innermost_frames() -> None:
    def deeper(depth: int, taken: Profiler) -> None:
        if depth:
            deeper(depth - 1, taken)
        else:
            taken.sample()

    taken = Profiler(1.0, 100, lambda _: None)
    deeper(300, taken)
    stack = max(taken.stacks(), key=lambda each: len(each.frames))
    assert stack.frames.count(";") == profiler.FRAMES_MAX
    assert "deeper" in stack.frames
    assert len(stack.frames) <= STACK_CHARACTERS_MAX


def test_names_say_module_class_and_function() -> None:
    assert name_of(render.__code__) == "kernel.observe.render.render"
    assert name_of(Profiler.stop.__code__) == "kernel.observe.profiler.Profiler.stop"
    assert name_of(threading.Event.wait.__code__) == "threading.Event.wait"
    odd = compile("def f(): pass", "/x;y\n.py", "exec")
    assert ";" not in name_of(odd) and "\n" not in name_of(odd)
