"""From a YAML document to `Written` values by path: the half of config_loader that reads files.

Interface: `document`. Invariants: L1 and L2 of config_loader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from manifold.kernel import labels
from manifold.kernel.config_loader import (
    DEPTH_MAX,
    DOCUMENT_BYTES_MAX,
    LIST_ROWS_MAX,
    TABLE_ROWS_MAX,
    KeyPath,
    Schema,
    Written,
    check,
    find,
    heads,
    keys_of,
)
from manifold.kernel.errors import ConfigError


def document(schema: Schema, data: bytes, file: str) -> dict[KeyPath, Written]:
    """Every value of a YAML document by its path; `file` is the name to use in refusals."""
    text = _text(data, file)
    reader = _Reader(schema, file)
    events = _events(text, file)
    for event in events:
        reader.take(event)
    return reader.written


def _text(data: bytes, file: str) -> str:
    if len(data) > DOCUMENT_BYTES_MAX:
        raise ConfigError(
            f"{file}:1:1: the file is larger than {DOCUMENT_BYTES_MAX} bytes.",
            "Is it a configuration of Manifold?",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        column = fault.start - data.rfind(b"\n", 0, fault.start)
        raise ConfigError(
            f"{file}:{line}:{column}: byte 0x{data[fault.start]:02x} is not UTF-8.",
            "Save the file as UTF-8.",
        ) from None
    tab = re.search(r"^[ ]*\t", text, re.MULTILINE)
    if tab:
        line = text.count("\n", 0, tab.start()) + 1
        column = tab.end() - tab.start()
        raise ConfigError(f"{file}:{line}:{column}: a tab in the indentation.", "Use spaces.")
    return text


def _events(text: str, file: str) -> Iterator[Any]:
    import yaml  # 25 ms: only those who read a file pay for it

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        yield from yaml.parse(text, Loader=loader)
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        place = f"{mark.line + 1}:{mark.column + 1}" if mark else "1:1"
        reason = fault.problem or fault.context or "it cannot be read"
        raise ConfigError(f"{file}:{place}: not YAML: {reason}.") from None
    except yaml.YAMLError as fault:  # the reader's: a character that YAML excludes
        reason = getattr(fault, "reason", None) or "it cannot be read"
        position = getattr(fault, "position", None) or 0
        before = text[: position if isinstance(position, int) else 0]
        place = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise ConfigError(f"{file}:{place}: not YAML: {reason}.") from None


class _Reader:
    """Turns events into `written`; `stack` holds the keys above the value that comes next."""

    def __init__(self, schema: Schema, file: str) -> None:
        self.schema = schema
        self.file = file
        self.written: dict[KeyPath, Written] = {}
        self.stack: list[str | None] = []  # one entry for each open mapping: the key being read
        self.seen: dict[KeyPath, set[str]] = {}
        self.pair: list[str] | None = None  # the texts of a list of two, while it is read
        self.layout: _Layout | None = None  # labels of a class, while they are read
        self.documents = 0

    def take(self, event: Any) -> None:
        kind = type(event).__name__
        if getattr(event, "anchor", None) is not None:
            raise self._refusal(event, "anchors and aliases are not used here.", "Write it out.")
        if getattr(event, "tag", None) not in (None, "!"):
            raise self._refusal(event, f"the tag {event.tag[:40]!r} is not used here.", "Drop it.")
        if self.layout is not None:
            self._take_label(event, kind)
            return
        match kind:
            case "DocumentStartEvent":
                self.documents += 1
                if self.documents > 1:
                    raise self._refusal(event, "a second document begins.", "Keep one.")
            case "MappingStartEvent":
                self._open(event)
            case "MappingEndEvent":
                self._close(event)
            case "ScalarEvent":
                self._scalar(event)
            case "SequenceStartEvent":
                self._open_list(event)
            case "SequenceEndEvent":
                self._close_list(event)
            case "StreamEndEvent" if self.documents == 0:
                raise self._refusal(
                    event, "the file is empty.", "Write at least `cluster: NAME`, or give no file."
                )
            case _:
                pass  # stream and document brackets carry nothing

    def _open(self, event: Any) -> None:
        path = self._path()
        if self.stack and self.stack[-1] is None:
            raise self._refusal(event, "a key must be a word.")
        if self._is_layout(path):
            self.layout = _Layout(self._where(event))
            return
        is_section = len(path) == 1 and (path[0] in self.schema.sections or self._is_table(path))
        is_row = len(path) == 2 and self._is_table(path)
        is_item = self._is_item(path)
        if self.pair is not None or path in self.schema.lists:
            raise self._refusal(event, self._wanted_list())
        if not (path == () or is_section or is_row or is_item):
            find(self.schema, path, Written("", self._where(event)))  # an unknown key says so
            raise self._refusal(event, f"{'.'.join(path)} takes one value, not keys.")
        assert len(self.stack) < DEPTH_MAX, "the schema bounds the depth"
        if is_row or is_item:
            self.written[path] = Written("", self._where(event))
        if is_item and int(path[2]) >= LIST_ROWS_MAX:
            raise self._refusal(
                event, f"{'.'.join(path[:2])} has more than {LIST_ROWS_MAX} entries."
            )
        self.stack.append(None)
        self.seen[path] = set()

    def _open_list(self, event: Any) -> None:
        path = self._path()
        if path in self.schema.lists:
            self.stack.append("0")  # its entries are keys that nobody writes
        elif self._is_pair(path) and self.pair is None:
            self.pair = []
        elif self.pair is not None or self._is_item(path):
            raise self._refusal(event, self._wanted_list())
        elif self._is_layout(path):
            raise self._refusal(event, self._wanted_labels())
        else:
            raise self._refusal(event, self._not_a_list())

    def _close_list(self, event: Any) -> None:
        path = self._path()
        if self.pair is None:
            self.stack.pop()
        elif len(self.pair) == 2:
            self.written[path] = Written(" ".join(self.pair), self._where(event))
            self.pair = None
        else:
            raise self._refusal(event, self._wanted_list())
        self._value_done()

    def _close(self, event: Any) -> None:
        self.stack.pop()
        path = self._path()
        if len(path) == 1 and self._is_table(path) and not self.seen[path]:
            raise self._refusal(event, f"{path[0]} has no rows.", "Write one or drop the key.")
        self._value_done()

    def _scalar(self, event: Any) -> None:
        if not self.stack:
            if event.value == "" and not event.style:
                raise self._refusal(event, "the file is empty.", "Write at least `cluster: NAME`.")
            raise self._refusal(event, "keys are wanted here, `key: value`.")
        if self.stack[-1] is None:
            self._key(event)
            return
        path = self._path()
        if self.pair is not None and len(self.pair) < 2 and not re.search(r"\s", event.value):
            self.pair.append(event.value)
            return
        if self.pair is not None or self._is_pair(path) or self._is_item(path):
            raise self._refusal(event, self._wanted_list())
        quoted = event.style in ("'", '"', "|", ">")
        if not quoted and event.value in ("", "~", "null", "Null", "NULL"):
            self._nothing(path, event)
        elif path[0] in self.schema.sections and len(path) == 1:
            raise self._refusal(event, f"{path[0]} takes keys, not the value {event.value[:40]!r}.")
        elif path in self.schema.lists:
            raise self._refusal(event, self._wanted_list())
        elif self._is_table(path) and len(path) < 3:
            raise self._refusal(event, f"{'.'.join(path)} takes keys, such as `count: 4`.")
        elif self._is_layout(path):
            raise self._refusal(event, self._wanted_labels())
        else:
            where = self._where(event)
            find(self.schema, path, Written("", where))
            self.written[path] = Written(event.value, where, quoted)
        self._value_done()

    def _take_label(self, event: Any, kind: str) -> None:
        assert self.layout is not None
        try:
            done = self.layout.take(event, kind)
        except ConfigError as refusal:
            path = ".".join(self._path())
            raise self._refusal(event, f"{path}: {refusal.message}", refusal.next_step) from None
        if done:
            self.written[self._path()] = Written(self.layout.text, self.layout.where)
            self.layout = None
            self._value_done()

    def _key(self, event: Any) -> None:
        name, table = event.value, self._path()
        if name in self.seen[table]:
            what = "the class" if self._is_table(table) and len(table) == 1 else "the key"
            raise self._refusal(event, f"{what} {name[:60]!r} stands twice.", "Keep one of them.")
        self.seen[table].add(name)
        path = (*table, name)
        if self._is_table(path) and len(path) == 2:
            self._row_name(name, event)
        elif not (len(path) == 1 and name in heads(self.schema)) and path not in self.schema.lists:
            find(self.schema, path, Written("", self._where(event)))
        self.stack[-1] = name

    def _row_name(self, name: str, event: Any) -> None:
        row = keys_of(self.schema.tables[self._path()[0]])["name"]
        try:
            check(row, name[:80], "the name of a class")
        except ConfigError as refusal:
            raise self._refusal(event, refusal.message) from None
        if len(self.seen[self._path()]) > TABLE_ROWS_MAX:
            raise self._refusal(event, f"there are more than {TABLE_ROWS_MAX} classes.")

    def _nothing(self, path: KeyPath, event: Any) -> None:
        """A section whose keys are all commented out is fine; a key without a value is not."""
        if (len(path) == 1 and path[0] in self.schema.sections) or path in self.schema.lists:
            return
        if len(path) == 2 and self._is_table(path):  # `rpi4:` is a class with every default
            self.written[path] = Written("", self._where(event))
            return
        raise self._refusal(event, f"{'.'.join(path)} has no value.", "Write one or drop the key.")

    def _is_table(self, path: KeyPath) -> bool:
        return bool(path) and path[0] in self.schema.tables

    def _path(self) -> KeyPath:
        return tuple(key for key in self.stack if key is not None)

    def _is_item(self, path: KeyPath) -> bool:
        return len(path) == 3 and path[:2] in self.schema.lists

    def _is_pair(self, path: KeyPath) -> bool:
        if len(path) != 4 or path[:2] not in self.schema.lists:
            return False
        return keys_of(self.schema.lists[path[:2]])[path[3]].pair

    def _is_layout(self, path: KeyPath) -> bool:
        if len(path) != 3 or not self._is_table(path):
            return False
        key = keys_of(self.schema.tables[path[0]]).get(path[2])
        return key is not None and key.layout

    def _value_done(self) -> None:
        path = self._path()
        if self.stack and self._is_item(path):
            self.stack[-1] = str(int(path[2]) + 1)
        elif self.stack:
            self.stack[-1] = None

    def _not_a_list(self) -> str:
        path = ".".join(self._path())
        return f"{path or 'the file'} takes no list; write `key: value` lines beneath it."

    def _wanted_labels(self) -> str:
        path = ".".join(self._path())
        return f"{path} takes keys with values, such as `{{site: lab, rack: [r1, r2]}}`."

    def _wanted_list(self) -> str:
        path = self._path()
        if len(path) == 4:
            return f"{'.'.join(path)} takes two sides, `[one, other]`."
        return (
            f"{'.'.join(path[:2])} takes a list of keys in braces, a line each: `- {{key: value}}`."
        )

    def _where(self, event: Any) -> str:
        return f"{self.file}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"

    def _refusal(self, event: Any, reason: str, next_step: str = "") -> ConfigError:
        return ConfigError(f"{self._where(event)}: {reason}", next_step)


class _Layout:
    """The labels of a class: `{site: lab, rack: [r1, r2], ssd}`, as one text for `read_layout`."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._parts: dict[str, list[str]] = {}
        self._key: str | None = None  # whose value comes next
        self._listed = False

    @property
    def text(self) -> str:
        return ",".join(
            f"{key}={'/'.join(values)}" if values else key for key, values in self._parts.items()
        )

    def take(self, event: Any, kind: str) -> bool:
        """True at the end; raises `ConfigError` without a place."""
        match kind:
            case "ScalarEvent" if self._key is None:
                self._begin(event.value)
            case "ScalarEvent":
                self._value(event.value, bool(event.style))
            case "SequenceStartEvent" if self._key is not None and not self._listed:
                self._listed = True
            case "SequenceEndEvent":
                if not self._parts[self._key or ""]:
                    raise ConfigError(f"the label {self._key} has no value.", "Write one.")
                self._key, self._listed = None, False
            case "MappingEndEvent":
                return True
            case _:
                raise ConfigError("a label has a word, or a list of words, as its value.")
        return False

    def _begin(self, key: str) -> None:
        labels.check(key)
        if key in self._parts:
            raise ConfigError(f"the label {key} stands twice.", "Keep one of them.")
        if len(self._parts) >= labels.LABELS_MAX:
            raise ConfigError(f"a node has at most {labels.LABELS_MAX} labels.")
        self._parts[key] = []
        self._key = key

    def _value(self, value: str, quoted: bool) -> None:
        key = self._key
        assert key is not None
        empty = not quoted and value in ("", "~", "null", "Null", "NULL")
        if not empty or self._listed:
            labels.check(f"{key}={value}")
            self._parts[key].append(value)
        if not self._listed:
            self._key = None
