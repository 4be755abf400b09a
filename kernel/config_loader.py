"""From a YAML document, variables and flags to frozen dataclasses, with a place for each refusal.

Knows nothing of Manifold's keys: a `Schema` of dataclasses, whose fields carry unit, range and
default in their metadata, says what is accepted.

Interface: `config_reader.document` reads a file into `Written` values by path; `from_environ` and
`from_overrides` do the same for variables and flags; `build` makes the dataclass. The key of a
field is its name without a unit suffix (`grain_ms` is `grain: 20ms`), because the value carries
the unit. Variables and flags may also use the field's own name, and then the value is a plain
number in that unit (`scheduler.grain_ms=20`): either way the unit stands there exactly once.
Invariants: L1 whatever the bytes, nothing but `ConfigError` is raised. L2 work and memory are
bounded by the constants below: libyaml hands out events one by one, and we count them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import Any, TypeVar

from manifold.kernel import config_units as units
from manifold.kernel import labels
from manifold.kernel.errors import ConfigError
from manifold.kernel.limits import NAME, NAME_WORDS

T = TypeVar("T")
KeyPath = tuple[str, ...]  # ("scheduler", "grain"), ("classes", "rpi4", "count"), ("cluster",)

DOCUMENT_BYTES_MAX = 1 << 18  # 64 classes of 400 bytes are 25 KiB; ten times that for comments
DEPTH_MAX = 4  # document, classes, one class, its key: nothing valid is deeper
TABLE_ROWS_MAX = 64  # classes; more kinds of machines than anybody has
LIST_ROWS_MAX = 256  # rules of links; 16 sites with a link of its own between any two take 120
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
    chars_max: int
    pair: bool  # written as a list of two
    layout: bool  # labels: written as keys with a value, or several, each


@dataclass(frozen=True, slots=True)
class Schema:
    """`sections` hold keys, `tables` hold named rows of keys, `root` has keys of its own; `lists`
    are keys of sections that hold rows without names."""

    root: type
    sections: Mapping[str, type]
    tables: Mapping[str, type]
    lists: Mapping[KeyPath, type]


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
    name = field.metadata.get("name", name)
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
        chars_max=field.metadata.get("chars_max", units.VALUE_CHARS_MAX),
        pair=field.metadata.get("pair", False),
        layout=field.metadata.get("layout", False),
    )


# --- values ---------------------------------------------------------------------------------


def check(key: Key, value: Any, path: str) -> None:
    """Raise a `ConfigError` without a place where `value` is outside what `key` allows."""
    if key.choices and value not in key.choices:
        near = nearest(str(value), key.choices)
        raise ConfigError(f"{path} is {value!r}; it must be one of {', '.join(key.choices)}.", near)
    if key.layout:
        try:
            labels.read_layout(value)
        except ConfigError as refusal:
            raise ConfigError(f"{path}: {refusal.message}", refusal.next_step) from None
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
    if key.pair:
        return "[side, side]"
    if key.layout:
        return "{key: value}"
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
        value = units.parse(text, key.kind, key.unit, key.chars_max)
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
    items: dict[KeyPath, dict[str, Any]] = {}
    for path, value in written.items():
        if len(path) == 2 and path[0] in schema.tables:  # the row itself: `rpi4: {}`
            rows.setdefault(path[0], {}).setdefault(path[1], {})
            continue
        if len(path) == 3 and path[:2] in schema.lists:
            items[path] = {}
            continue
        key = find(schema, path, value)
        parsed = _value(key, value, path)
        match path:
            case (_,):
                arguments[key.field] = parsed
            case (section, _):
                parts.setdefault(section, {})[key.field] = parsed
            case (table, row, _):
                rows.setdefault(table, {}).setdefault(row, {})[key.field] = parsed
            case (_, _, _, _):
                items[path[:3]][key.field] = parsed
            case _:
                raise AssertionError(f"{file}: a path of {len(path)} words")
    for (section, name, number), given in items.items():
        item = schema.lists[section, name](**given)
        found = parts.setdefault(section, {}).get(name, ())
        assert int(number) == len(found), "entries are numbered as they are read"
        parts[section][name] = (*found, item)
    for section, given in parts.items():
        arguments[section] = schema.sections[section](**given)
    for table, named in rows.items():
        make = schema.tables[table]
        arguments[table] = tuple(make(name=name, **given) for name, given in named.items())
    return arguments


def find(schema: Schema, path: KeyPath, written: Written) -> Key:
    """The key at `path`, or a refusal that names the nearest."""
    head, *rest = path
    if head in schema.tables and len(path) == 3:
        known = _row_keys(schema.tables[head])
    elif head in schema.sections and len(path) == 2:
        known = keys_of(schema.sections[head])
    elif path[:2] in schema.lists and len(path) == 4:
        known = keys_of(schema.lists[path[:2]])
    elif len(path) == 1:
        known = keys_of(schema.root)
    else:
        known = {}
    key = known.get(path[-1])
    if key is None and written.bare:
        key = next((each for each in known.values() if each.field == path[-1]), None)
    if key is None:
        raise _unknown(schema, path, written.where, [*known, *([] if rest else heads(schema))])
    return key


def _row_keys(row: type) -> dict[str, Key]:
    """The keys of one row; its name is the key that it stands under, so not one of them."""
    return {name: key for name, key in keys_of(row).items() if name != "name"}


def heads(schema: Schema) -> list[str]:
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
    for (section, name), item in schema.lists.items():
        for number in (rows or {}).get(f"{section}.{name}", ()):
            yield from ((section, name, number, key) for key in keys_of(item))


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
    begins = tuple(prefix + head.upper() + "_" for head in heads(schema))

    def like_a_key(name: str) -> bool:
        return name.startswith(begins) or bool(nearest(name, known, 0.85))

    return _named(known, given, "variable ", like_a_key, 1)


def _field_names(
    schema: Schema, rows: Mapping[str, Iterable[str]], join: Callable[[KeyPath], str]
) -> dict[str, KeyPath]:
    """The names with a unit suffix, which the file does not have."""
    found = {}
    for path in paths(schema, rows):
        key = find(schema, path, Written("", ""))
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
