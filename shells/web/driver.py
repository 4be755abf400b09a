"""How a console that is served draws: Textual's web driver, which ends with its server.

Interface rules: a served process is started with `TEXTUAL_DRIVER` naming `ConsoleDriver`. Packets
go over standard input and output: a letter, four bytes of length, the payload.
Invariants: W1 the process ends when its standard input closes, so that a server that is killed
leaves nothing; Textual's own driver would go on without a reader. W2 it starts with the focus.
Source: textual/drivers/web_driver.py.
"""

from __future__ import annotations

import os
import threading

from textual import events, messages
from textual.drivers.web_driver import WebDriver

LEAVE_S = 5.0  # an orderly end takes 0.2 s; a console that hangs is ended all the same
FAILED = 1


class ConsoleDriver(WebDriver):
    """Packets on standard input and output, for as long as somebody reads them."""

    _gone = False

    def start_application_mode(self) -> None:
        """As Textual does, and with the focus: the tab has just been opened."""
        self._write = self._write_all  # type: ignore[assignment]
        super().start_application_mode()
        self._app.call_later(self._app.post_message, events.AppFocus())

    def _write_all(self, data: bytes) -> None:
        """Everything, also where a signal interrupts; nothing once the server has gone (W1)."""
        view = memoryview(data)
        while view and not self._gone:
            try:
                view = view[os.write(self.fileno, view) :]
            except BrokenPipeError:
                self._leave()

    def run_input_thread(self) -> None:
        """Input, until the server closes it: then the application has to end."""
        super().run_input_thread()
        if not self.exit_event.is_set():
            self._leave()

    def _leave(self) -> None:
        if self._gone:
            return
        self._gone = True
        last_resort = threading.Timer(LEAVE_S, os._exit, (FAILED,))
        last_resort.daemon = True
        last_resort.start()
        self.send_message(messages.ExitApp())
