// The page of `manifold web`: a terminal, its websocket, and a notice when that breaks.
// What goes over the websocket is defined in shells/web/messages.py.
"use strict";

const KEYS_CHARS_MAX = 16384; // of one message: what is pasted goes in pieces
const FONT_PX = 15;
const FONTS = '"DejaVu Sans Mono", "Liberation Mono", Menlo, Consolas, monospace';
const BROKEN =
  "The connection to the console has broken. If it does not come back, start " +
  "`manifold web` again, and open the address that it prints.";

const notice = document.getElementById("notice");
const reason = document.getElementById("reason");
const words = document.getElementById("words");
const again = document.getElementById("again");

const terminal = new Xterm.Terminal({
  allowProposedApi: true, // for the widths of Unicode 11, which are Textual's
  cursorBlink: false,
  fontFamily: FONTS,
  fontSize: FONT_PX,
  scrollback: 0,
  theme: { background: "#10141b", foreground: "#cfd6e1" },
});
const fit = new Xterm.FitAddon();
let socket = null;
let ended = null; // what the server said of the end, before it closed

terminal.loadAddon(fit);
terminal.loadAddon(new Xterm.CanvasAddon());
terminal.loadAddon(new Xterm.Unicode11Addon());
terminal.unicode.activeVersion = "11";

function send(...message) {
  if (socket && socket.readyState === WebSocket.OPEN) {
    socket.send(JSON.stringify(message));
  }
}

function sendKeys(text) {
  let from = 0;
  while (from < text.length) {
    let to = Math.min(from + KEYS_CHARS_MAX, text.length);
    const last = text.charCodeAt(to - 1);
    if (to < text.length && last >= 0xd800 && last < 0xdc00) {
      to -= 1; // a pair of surrogates stays together
    }
    send("web.keys", text.slice(from, to));
    from = to;
  }
}

function connect() {
  notice.hidden = true;
  document.body.classList.remove("away");
  document.body.dataset.state = "connecting";
  ended = null;
  terminal.reset();
  fit.fit();
  terminal.write(`\x1b[2m${document.title}: starting the console …\x1b[0m`);
  const url = new URL("socket", location.href);
  url.protocol = "ws:";
  url.search = `?columns=${terminal.cols}&rows=${terminal.rows}`;
  socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => {
    document.body.dataset.state = "open";
    terminal.focus();
  };
  socket.onmessage = (event) => {
    if (typeof event.data === "string") {
      hear(JSON.parse(event.data));
    } else {
      terminal.write(new Uint8Array(event.data));
    }
  };
  socket.onclose = () => {
    say(ended ? ended.reason : BROKEN, ended ? ended.words : "");
  };
}

function hear([kind, ...rest]) {
  if (kind === "web.ended") {
    ended = { reason: rest[0], words: rest[1] };
  } else if (kind === "web.download") {
    const link = document.createElement("a");
    link.href = `download/${encodeURIComponent(rest[0])}`;
    link.download = "";
    link.click();
  } else if (kind === "web.open" && /^https?:/.test(rest[0])) {
    if (confirm(`The console wants to open ${rest[0]}`)) {
      window.open(rest[0], "_blank", "noopener,noreferrer");
    }
  }
}

function say(text, lastWords) {
  reason.textContent = text;
  words.textContent = lastWords;
  words.hidden = !lastWords;
  notice.hidden = false;
  document.body.classList.add("away");
  document.body.dataset.state = "away";
  again.focus();
}

// An application copies with OSC 52. It may write the clipboard, never read it.
terminal.parser.registerOscHandler(52, (data) => {
  const text = data.slice(data.indexOf(";") + 1);
  if (text && text !== "?" && navigator.clipboard) {
    const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
    navigator.clipboard.writeText(new TextDecoder().decode(bytes)).catch((fault) => {
      console.warn("the browser does not let the console copy:", fault.message);
    });
  }
  return true;
});

// Ctrl-C copies what is selected (with shift and the mouse); without a selection it is a key.
terminal.attachCustomKeyEventHandler(
  (event) => !(event.ctrlKey && event.key === "c" && terminal.hasSelection()),
);

terminal.onData(sendKeys);
terminal.onBinary(sendKeys);
terminal.onResize((size) => send("web.resize", size.cols, size.rows));
window.addEventListener("resize", () => fit.fit());
window.addEventListener("focus", () => send("web.focus", true));
window.addEventListener("blur", () => send("web.focus", false));
again.addEventListener("click", connect);

terminal.open(document.getElementById("screen"));
window.terminal = terminal;
connect();
