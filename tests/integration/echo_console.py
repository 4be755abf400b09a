"""A small Textual application for tests of `manifold web`: it says what it is told."""

from __future__ import annotations

import io
import os
import sys

from textual.app import App, ComposeResult
from textual.widgets import Input, RichLog

LONG = 1000


class Echo(App[None]):
    """`quit` ends it, `fail` ends it with a sentence, `size` says how large it is."""

    def compose(self) -> ComposeResult:
        yield RichLog()
        yield Input(placeholder="say something")

    def on_mount(self) -> None:
        self.query_one(Input).focus()
        self.query_one(RichLog).write(f"process {os.getpid()} is ready")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.input.clear()
        if event.value == "quit":
            self.exit()
        elif event.value == "fail":
            self.exit(return_code=3, message="the cluster has gone home")
        elif event.value == "size":
            self.query_one(RichLog).write(f"{self.size.width} x {self.size.height} cells")
        elif event.value == "hang":
            os.read(os.pipe()[0], 1)  # for ever: nobody writes to it
        elif event.value == "save":
            self.deliver_text(io.StringIO("what was saved"), save_filename="a file.txt")
        elif len(event.value) > LONG:
            self.query_one(RichLog).write(f"heard {len(event.value)} characters")
        else:
            self.query_one(RichLog).write(f"heard {event.value}")


if __name__ == "__main__":
    app = Echo()
    app.run()
    sys.exit(app.return_code)
