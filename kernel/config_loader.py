"""From a YAML document, variables and flags to frozen dataclasses, with a place for each refusal.

Knows nothing of Manifold's keys: a `Schema` of dataclasses, whose fields carry unit, range and
default in their metadata, says what is accepted.

Interface: `document` reads a file into `Written` values by path; `from_environ` and
`from_overrides` do the same for variables and flags; `build` makes the dataclass. The key of a
field is its name without a unit suffix (`grain_ms` is `grain: 20ms`), because the value carries
the unit. Variables and flags may also use the field's own name, and then the value is a plain
number in that unit (`scheduler.grain_ms=20`): either way the unit stands there exactly once.
Invariants: L1 whatever the bytes, nothing but `ConfigError` is raised. L2 work and memory are
bounded by the constants below: libyaml hands out events one by one, and we count them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import Any, TypeVar

from manifold.kernel import config_units as units
from manifold.kernel.errors import ConfigError
from manifold.kernel.limits import NAME, NAME_WORDS

T = TypeVar("T")
KeyPath = tuple[str, ...]  # ("scheduler", "grain"), ("classes", "rpi4", "count"), ("cluster",)

DOCUMENT_BYTES_MAX = 1 << 18  # 64 classes of 400 bytes are 25 KiB; ten times that for comments
DEPTH_MAX = 4  # document, classes, one class, its key: nothing valid is deeper
TABLE_ROWS_MAX = 64  # classes; more kinds of machines than anybody has
SUFFIX = "_ms"  # the one unit suffix that field names carry


@dataclass(frozen=True, slots=True)
class Key:
    """One key, as its dataclass field declares it."""

    field: str
    name: str
    kind: str
    unit: str
    low: float | None
    high: float | None
    default: Any
    doc: str
    choices: tuple[str, ...]
    name_chars_max: int


@dataclass(frozen=True, slots=True)
class Schema:
    """`sections` hold keys, `tables` hold named rows of keys, `root` has keys of its own."""

    root: type
    sections: Mapping[str, type]
    tables: Mapping[str, type]


@dataclass(frozen=True, slots=True)
class Written:
    """A value as somebody wrote it.

    `bare`: its unit is in the key, so the value is plain. `source`: the higher has the last word.
    """

    text: str
    where: str
    quoted: bool = False
    bare: bool = False
    source: int = 0


@cache
def keys_of(table: type) -> dict[str, Key]:
    """The keys of a dataclass by the name they have in the file, in the order of the fields.

    Cached: callers do not change it.
    """
    keys = {}
    for field in fields(table):
        if "unit" in field.metadata:
            key = _key_of(field)
            keys[key.name] = key
    return keys


def _key_of(field: Field[Any]) -> Key:
    unit = field.metadata["unit"]
    name = field.name.removesuffix(SUFFIX) if unit in units.SCALES else field.name
    assert field.default is not MISSING, f"{field.name} has no default"
    return Key(
        field=field.name,
        name=name,
        kind=str(field.type),
        unit=unit,
        low=field.metadata["low"],
        high=field.metadata["high"],
        default=field.default,
        doc=field.metadata["doc"],
        choices=field.metadata.get("choices", ()),
        name_chars_max=field.metadata.get("name_chars_max", 0),
    )


# --- values ---------------------------------------------------------------------------------


def check(key: Key, value: Any, path: str) -> None:
    """Raise a `ConfigError` without a place where `value` is outside what `key` allows."""
    if key.choices and value not in key.choices:
        near = nearest(str(value), key.choices)
        raise ConfigError(f"{path} is {value!r}; it must be one of {', '.join(key.choices)}.", near)
    if key.name_chars_max and not (NAME.match(value) and len(value) <= key.name_chars_max):
        raise ConfigError(
            f"{path} is {value!r}; a name has 1 to {key.name_chars_max} characters, {NAME_WORDS}."
        )
    if key.low is not None and not key.low <= value:
        raise ConfigError(_outside(key, value, path), f"Write at least {_shown(key, key.low)}.")
    if key.high is not None and not value <= key.high:
        raise ConfigError(_outside(key, value, path), f"Write at most {_shown(key, key.high)}.")


def allowed(key: Key) -> str:
    """The range or the choices, in words."""
    if key.choices:
        return " or ".join(key.choices)
    if key.low is not None and key.high is not None:
        return f"{_shown(key, key.low)} to {_shown(key, key.high)}"
    return "true or false" if key.kind == "bool" else "a name"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`Did you mean …?`, or nothing."""
    import difflib  # only a refusal pays for it

    close = difflib.get_close_matches(word[:100], list(known), 1, cutoff)
    return f"Did you mean {close[0]}?" if close else ""


def _shown(key: Key, value: float) -> str:
    return units.show(value, key.unit)


def _outside(key: Key, value: float, path: str) -> str:
    default = f", by default {_shown(key, key.default)}"
    return f"{path} is {_shown(key, value)}; it must be {allowed(key)}{default}."


def _value(key: Key, written: Written, path: KeyPath) -> Any:
    dotted = ".".join(path)
    text = written.text
    if written.bare:
        text = _with_unit_of_key(key, written, dotted)
    elif written.quoted and key.kind != "str" and key.unit not in units.SCALES:
        raise ConfigError(f"{written.where}: {dotted} is a text.", "Remove the quotes.")
    try:
        value = units.parse(text, key.kind, key.unit)
        check(key, value, dotted)
    except units.WrongValue as refusal:
        raise ConfigError(f"{written.where}: {dotted} {refusal}.") from None
    except ConfigError as refusal:
        raise ConfigError(f"{written.where}: {refusal.message}", refusal.next_step) from None
    return value


def _with_unit_of_key(key: Key, written: Written, dotted: str) -> str:
    try:
        units.parse(written.text, "float", "")
    except units.WrongValue:
        raise ConfigError(
            f"{written.where}: {dotted} is {written.text[: units.VALUE_CHARS_MAX]!r}, but the "
            f"unit is already in the name {key.field}.",
            f"Give a plain number, or a value with a unit to {key.name}.",
        ) from None
    return f"{written.text}{key.unit}"


# --- where a key may stand ------------------------------------------------------------------


def build(schema: Schema, written: Mapping[KeyPath, Written], file: str) -> dict[str, Any]:
    """The arguments of `schema.root`; what nobody wrote is left to the defaults.

    A table that nobody wrote is left out whole; one that somebody wrote is exactly its rows.
    """
    arguments: dict[str, Any] = {}
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    parts: dict[str, dict[str, Any]] = {}
    for path, value in written.items():
        if len(path) == 2 and path[0] in schema.tables:  # the row itself: `rpi4: {}`
            rows.setdefault(path[0], {}).setdefault(path[1], {})
            continue
        key = _find(schema, path, value)
        parsed = _value(key, value, path)
        match path:
            case (_,):
                arguments[key.field] = parsed
            case (section, _):
                parts.setdefault(section, {})[key.field] = parsed
            case (table, row, _):
                rows.setdefault(table, {}).setdefault(row, {})[key.field] = parsed
            case _:
                raise AssertionError(f"{file}: a path of {len(path)} words")
    for section, given in parts.items():
        arguments[section] = schema.sections[section](**given)
    for table, named in rows.items():
        make = schema.tables[table]
        arguments[table] = tuple(make(name=name, **given) for name, given in named.items())
    return arguments


def _find(schema: Schema, path: KeyPath, written: Written) -> Key:
    """The key at `path`, or a refusal that names the nearest."""
    head, *rest = path
    if head in schema.tables and len(path) == 3:
        known = _row_keys(schema.tables[head])
    elif head in schema.sections and len(path) == 2:
        known = keys_of(schema.sections[head])
    elif len(path) == 1:
        known = keys_of(schema.root)
    else:
        known = {}
    key = known.get(path[-1])
    if key is None and written.bare:
        key = next((each for each in known.values() if each.field == path[-1]), None)
    if key is None:
        raise _unknown(schema, path, written.where, [*known, *([] if rest else _heads(schema))])
    return key


def _row_keys(row: type) -> dict[str, Key]:
    """The keys of one row; its name is the key that it stands under, so not one of them."""
    return {name: key for name, key in keys_of(row).items() if name != "name"}


def _heads(schema: Schema) -> list[str]:
    return [*schema.sections, *schema.tables]


def _unknown(schema: Schema, path: KeyPath, where: str, siblings: Iterable[str]) -> ConfigError:
    siblings = list(siblings)
    dotted = ".".join(path)
    near = nearest(path[-1], siblings)
    if not near:  # a key of another section, or a section's key written at the top
        elsewhere = [".".join(each) for each in paths(schema)]
        near = nearest(path[-1], [each for each in elsewhere if each.endswith("." + path[-1])], 0)
    if not near and siblings:
        near = f"Known here: {', '.join(siblings)}."
    return ConfigError(f"{where}: there is no key {dotted}.", near)


def paths(schema: Schema, rows: Mapping[str, Iterable[str]] | None = None) -> Iterator[KeyPath]:
    """Every path a value may have, given the names of the rows of each table."""
    yield from ((name,) for name in keys_of(schema.root))
    for section, table in schema.sections.items():
        yield from ((section, name) for name in keys_of(table))
    for name, table in schema.tables.items():
        for row in (rows or {}).get(name, ()):
            yield from ((name, row, key) for key in _row_keys(table))


# --- flags and variables --------------------------------------------------------------------


def from_overrides(
    schema: Schema, overrides: Mapping[str, str], rows: Mapping[str, Iterable[str]]
) -> dict[KeyPath, Written]:
    """`scheduler.grain` = `10ms`, or `scheduler.grain_ms` = `10`."""
    known = {".".join(path): path for path in paths(schema, rows)}
    known |= _field_names(schema, rows, ".".join)
    return _named(known, overrides, "override ", lambda _name: True, 2)


def from_environ(
    schema: Schema,
    environ: Mapping[str, str],
    rows: Mapping[str, Iterable[str]],
    prefix: str,
    not_keys: Iterable[str],
) -> dict[KeyPath, Written]:
    """`MANIFOLD_SCHEDULER_GRAIN` = `10ms`; what is near a key but is none is refused."""
    given = {
        name: value
        for name, value in environ.items()
        if name.startswith(prefix) and name not in not_keys
    }
    if not given:
        return {}

    def variable(path: KeyPath) -> str:
        return prefix + "_".join(path).upper().replace("-", "_")

    known = {variable(path): path for path in paths(schema, rows)}
    known |= _field_names(schema, rows, variable)
    known = {name: path for name, path in known.items() if name not in not_keys}
    heads = tuple(prefix + head.upper() + "_" for head in _heads(schema))

    def like_a_key(name: str) -> bool:
        return name.startswith(heads) or bool(nearest(name, known, 0.85))

    return _named(known, given, "variable ", like_a_key, 1)


def _field_names(
    schema: Schema, rows: Mapping[str, Iterable[str]], join: Callable[[KeyPath], str]
) -> dict[str, KeyPath]:
    """The names with a unit suffix, which the file does not have."""
    found = {}
    for path in paths(schema, rows):
        key = _find(schema, path, Written("", ""))
        if key.field != key.name:
            found[join((*path[:-1], key.field))] = (*path[:-1], key.field)
    return found


def _named(
    known: Mapping[str, KeyPath],
    given: Mapping[str, str],
    what: str,
    is_ours: Callable[[str], bool],
    source: int,
) -> dict[KeyPath, Written]:
    found: dict[KeyPath, Written] = {}
    for name, text in given.items():
        path = known.get(name)
        if path is None:
            if is_ours(name):
                raise ConfigError(
                    f"{what}{name[:100]}: there is no such key.", nearest(name, known)
                )
            continue
        plain = (*path[:-1], path[-1].removesuffix(SUFFIX))
        if plain in found:
            raise ConfigError(f"{what}{name}: {'.'.join(plain)} is given twice.", "Keep one.")
        bare = path[-1].endswith(SUFFIX)
        found[plain] = Written(text.strip(), f"{what}{name}", bare=bare, source=source)
    return found


# --- the file -------------------------------------------------------------------------------


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
        self.documents = 0

    def take(self, event: Any) -> None:
        kind = type(event).__name__
        if getattr(event, "anchor", None) is not None:
            raise self._refusal(event, "anchors and aliases are not used here.", "Write it out.")
        if getattr(event, "tag", None) not in (None, "!"):
            raise self._refusal(event, f"the tag {event.tag[:40]!r} is not used here.", "Drop it.")
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
                raise self._refusal(event, self._not_a_list())
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
        is_section = len(path) == 1 and (path[0] in self.schema.sections or self._is_table(path))
        is_row = len(path) == 2 and self._is_table(path)
        if not (path == () or is_section or is_row):
            _find(self.schema, path, Written("", self._where(event)))  # an unknown key says so
            raise self._refusal(event, f"{'.'.join(path)} takes one value, not keys.")
        assert len(self.stack) < DEPTH_MAX, "the schema bounds the depth"
        if is_row:
            self.written[path] = Written("", self._where(event))
        self.stack.append(None)
        self.seen[path] = set()

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
        quoted = event.style in ("'", '"', "|", ">")
        if not quoted and event.value in ("", "~", "null", "Null", "NULL"):
            self._nothing(path, event)
        elif path[0] in self.schema.sections and len(path) == 1:
            raise self._refusal(event, f"{path[0]} takes keys, not the value {event.value[:40]!r}.")
        elif self._is_table(path) and len(path) < 3:
            raise self._refusal(event, f"{'.'.join(path)} takes keys, such as `count: 4`.")
        else:
            where = self._where(event)
            _find(self.schema, path, Written("", where))
            self.written[path] = Written(event.value, where, quoted)
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
        elif not (len(path) == 1 and name in _heads(self.schema)):
            _find(self.schema, path, Written("", self._where(event)))
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
        if len(path) == 1 and path[0] in self.schema.sections:
            return
        if len(path) == 2 and self._is_table(path):  # `rpi4:` is a class with every default
            self.written[path] = Written("", self._where(event))
            return
        raise self._refusal(event, f"{'.'.join(path)} has no value.", "Write one or drop the key.")

    def _is_table(self, path: KeyPath) -> bool:
        return bool(path) and path[0] in self.schema.tables

    def _path(self) -> KeyPath:
        return tuple(key for key in self.stack if key is not None)

    def _value_done(self) -> None:
        if self.stack:
            self.stack[-1] = None

    def _not_a_list(self) -> str:
        path = ".".join(self._path())
        return f"{path or 'the file'} takes no list; write `key: value` lines beneath it."

    def _where(self, event: Any) -> str:
        return f"{self.file}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"

    def _refusal(self, event: Any, reason: str, next_step: str = "") -> ConfigError:
        return ConfigError(f"{self._where(event)}: {reason}", next_step)
