"""Records a cluster's events into a file, without a screen."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from manifold.kernel.errors import NoCluster
from manifold.shells.console import messages as e
from manifold.shells.console.feed import Feed, clock_ms
from manifold.shells.console.model import Model, Observation
from manifold.shells.console.recording import Recorder


def record(
    cluster: str,
    environ: Mapping[str, str],
    path: Path,
    *,
    seconds: float | None,
    force: bool,
    told: Callable[[e.Event], None],
) -> int:
    """Until `seconds` are over, or Ctrl-C; how many events there were."""
    seen: queue.SimpleQueue[Observation | e.Event] = queue.SimpleQueue()
    feed = Feed(cluster, environ, seen.put)
    feed.want_logs(True)
    model = Model()
    recorder: Recorder | None = None
    feed.start()
    deadline_s = None if seconds is None else time.monotonic() + seconds
    try:
        while deadline_s is None or time.monotonic() < deadline_s:
            try:
                what = seen.get(timeout=_left_s(deadline_s))
            except queue.Empty:
                break
            if recorder is None:
                if isinstance(what, e.Lost):
                    raise NoCluster(what.why, what.next)
                recorder = Recorder(path, cluster, clock_ms(), force=force)
            if isinstance(what, Observation):
                recorder.write(model.observe(what, clock_ms()))
            else:
                model.apply(what)
                recorder.write([what])
                told(what)
    except KeyboardInterrupt:
        told(e.Looked(clock_ms()))  # how it is ended; everything seen is in the file
    finally:
        feed.stop()
        if recorder is not None:
            recorder.close()
    return recorder.events if recorder is not None else 0


def _left_s(deadline_s: float | None) -> float | None:
    return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
