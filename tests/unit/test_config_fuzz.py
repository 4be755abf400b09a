"""Whatever a configuration says, the loader answers with a Config or a ConfigError."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel import config_loader as loader
from manifold.kernel import config_units as units
from manifold.kernel.config import SCHEMA, Config, load
from manifold.kernel.config_document import yaml_text
from manifold.kernel.errors import ConfigError

PATHS = list(loader.paths(SCHEMA, {"classes": ["server", "rpi4"]}))
words = st.sampled_from([*sorted({word for path in PATHS for word in path}), "name", "<<", "x"])
values = st.one_of(
    st.builds(
        lambda number, unit: f"{number}{unit}",
        st.one_of(st.integers(-(10**20), 10**20), st.floats()),
        st.sampled_from(["", " ", "ms", "s", "min", "MiB", "MB", "Gbit/s", "%", "us"]),
    ),
    st.sampled_from(["true", "~", "geode", '"3"', "[1]", "{a: 1}", "*x", "&x 3", "!!int 3", "''"]),
    st.text(max_size=80),
)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Nearly right documents: real keys with any value, at any depth, now and then torn."""
    lines = []
    for section in draw(st.lists(words, max_size=4)):
        lines.append(f"{section}:")
        for key in draw(st.lists(words, max_size=4)):
            lines.append(f"  {key}: {draw(values)}")
    text = "\n".join(lines)
    return text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


def outcome(data: bytes) -> Config | ConfigError:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(data)
        file.flush()
        try:
            return load(Path(file.name), {})
        except ConfigError as refusal:
            assert str(refusal).startswith(file.name + ":")
            return refusal


@settings(max_examples=400, deadline=None)
@given(documents())
def test_a_nearly_right_document_loads_or_is_refused_with_a_place(text: str) -> None:
    outcome(text.encode("utf-8", "surrogatepass"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_load_or_are_refused_with_a_place(data: bytes) -> None:
    outcome(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_packaged_file_with_some_bytes_changed_loads_or_is_refused(data: st.DataObject) -> None:
    text = bytearray(yaml_text(Config()).encode())
    for _ in range(data.draw(st.integers(1, 5))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    outcome(bytes(text))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from(["MANIFOLD_" + "_".join(path).upper() for path in PATHS]),
            st.text(max_size=30).map(lambda text: "MANIFOLD_" + text),
        ),
        values,
        max_size=4,
    )
)
def test_any_variables_and_flags_are_taken_or_refused(environ: dict[str, str]) -> None:
    flags = {
        name.removeprefix("MANIFOLD_").lower().replace("_", "."): text
        for name, text in environ.items()
    }
    for arguments in ((environ, {}), ({}, flags)):
        try:
            load(None, *arguments)
        except ConfigError:
            continue


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), st.data())
def test_a_value_in_range_reads_back_as_it_was_shown(path: tuple[str, ...], data) -> None:
    tables = {1: Config, 2: SCHEMA.sections.get(path[0]), 3: SCHEMA.tables["classes"]}
    key = loader.keys_of(tables[len(path)])[path[-1]]
    if key.kind not in ("int", "float"):
        return
    numbers = (
        st.integers(int(key.low), int(key.high))
        if key.kind == "int"
        else st.floats(key.low, key.high, allow_subnormal=False)
    )
    value = data.draw(numbers)
    back = units.parse(units.show(value, key.unit), key.kind, key.unit)
    assert math.isclose(back, value, rel_tol=1e-15)
    assert key.kind == "float" or back == value
