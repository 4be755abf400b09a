"""How a node is looked at: its HTTP server, and the system calls for metrics and profiles.

Interface rules: used from the loop's thread. A node that cannot listen goes on without its HTTP
server; the system calls answer in any case. One profile at a time. However often somebody asks over
HTTP, metrics are gathered at most every `FRESH_S` and format: it is a local process, not a client.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from manifold.kernel.errors import Busy
from manifold.kernel.hyperbus.driver import Incoming
from manifold.kernel.hyperbus.faults import to_failure
from manifold.kernel.observe import http, render
from manifold.kernel.observe.gather import gather
from manifold.kernel.observe.messages import GetMetrics, Metrics, Profile, ProfileNode
from manifold.kernel.observe.profiler import Found, Profiler

if TYPE_CHECKING:
    from manifold.kernel.node import Node

log = logging.getLogger("manifold.observe")

FRESH_S = 0.2  # 0.4 ms each in two formats: 0.4 % of a core at most; nobody scrapes as often


class Observatory:
    """See the module."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._server: http.Server | None = None
        self._profiler: Profiler | None = None
        self._pages: dict[str, tuple[float, bytes]] = {}  # by content type: until when, and what

    @property
    def address(self) -> str:
        """HOST:PORT of the HTTP server, "" where there is none."""
        return self._server.address if self._server is not None else ""

    def http_requests(self) -> int:
        return sum(self._server.answered.values()) if self._server is not None else 0

    def start(self) -> None:
        """Listen, unless that is off; from here on the address is known."""
        config = self._node.spec.config.metrics
        if config.http == "off":
            return
        pages = {"/metrics": self._metrics_page, "/healthz": self._health_page}
        try:
            self._server = http.Server(config.port, pages, self._node.loop)
        except OSError as fault:
            log.warning("no HTTP server for metrics: %s; set metrics.port", fault.strerror)
            return
        log.info("metrics at http://%s/metrics", self._server.address)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.join()

    def _metrics_page(self, accept: str) -> tuple[str, bytes]:
        content_type = render.negotiate(accept)
        now_s = self._node.loop.time()
        until_s, page = self._pages.get(content_type, (0.0, b""))
        if now_s >= until_s:
            page = render.render(gather(self._node), content_type).encode()
            self._pages[content_type] = (now_s + FRESH_S, page)
        return content_type, page

    def _health_page(self, accept: str) -> tuple[str, bytes]:
        """That it answers says that its loop turns; what it says is who answered."""
        spec = self._node.spec
        said = {"node": spec.alias, "cluster": spec.config.cluster, "boot": self._node.boot}
        return "application/json", json.dumps(said).encode() + b"\n"

    # -- system calls -------------------------------------------------------------------------

    def serve(self, incoming: Incoming) -> None:
        node, body = self._node, incoming.body
        if isinstance(body, GetMetrics):
            families = gather(node)
            who = (node.spec.alias, node.identity.kid, self.address)
            if body.form == "families":
                node.bus.reply(incoming, Metrics(*who, "", families))
                return
            form = render.OPENMETRICS if body.form == "openmetrics" else render.PROMETHEUS
            node.bus.reply(incoming, Metrics(*who, render.render(families, form)))
        elif isinstance(body, ProfileNode):
            self._profile(incoming, body)

    def _profile(self, incoming: Incoming, asked: ProfileNode) -> None:
        if self._profiler is not None:
            error = Busy("A profile of this node is being taken.", "Come again when it is over.")
            self._node.bus.reply(incoming, to_failure(error))
            return
        loop = self._node.loop

        def done(found: Found) -> None:
            loop.call_soon_threadsafe(self._profiled, incoming, found)

        self._profiler = Profiler(asked.seconds, asked.hz, done)
        self._profiler.start()
        log.info("a profile of %g s at %d Hz, for %s", asked.seconds, asked.hz, incoming.source)

    def _profiled(self, incoming: Incoming, found: Found) -> None:
        node, self._profiler = self._node, None
        node.tally.profiles += 1
        answer = Profile(
            node.spec.alias, node.identity.kid, found.seconds, found.samples, found.cpu_s,
            found.stacks, found.truncated,
        )  # fmt: skip
        node.bus.reply(incoming, answer)
