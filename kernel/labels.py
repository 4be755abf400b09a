"""Labels of nodes, what is said about them, and what is asked of them. Pure.

A label is `key=value` or a bare `key`; a node has one of each key. `site`, `rack` and `org` say
what fails together. A wish is `key=value`, `key` (with whatever value) or either behind a `!`; what
a node is by itself, its facts, is wished for like a label: `class=rpi4`, `arch=aarch64`, `gpu`.
A layout is what a class of nodes is given: `site=a,rack=r1/r2`; where a key has several values the
nodes of the class take turns.

Interface: `read` and `read_layout` check what somebody wrote and raise `ConfigError`, `read_wishes`
`Refused`; the rest takes what these have returned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from manifold.kernel.errors import ConfigError, Refused

LABELS_MAX = 16  # of one node
WISHES_MAX = 32  # of one demand, as geode's MAX_LABELS
KEY_CHARS_MAX = 32
VALUE_CHARS_MAX = 32
# All of a node with a byte between them. A description has 512 B (membership): the longest alias
# and class, an address of 99 B and the figures take some 230 of them.
BYTES_MAX = 256
LAYOUT_CHARS_MAX = 4096  # 64 values of 32 characters for each of two keys

GROUPS = ("site", "rack", "org")  # the keys that tell what fails together, the largest first
FACTS = ("arch", "class", "gpu")  # keys that a node has by itself

_WORD = r"[{0}](?:[{0}._-]*[{0}])?"
_KEY = re.compile(_WORD.format("a-z0-9") + r"\Z")
_VALUE = re.compile(_WORD.format("A-Za-z0-9") + r"\Z")
_KEY_WORDS = f"1 to {KEY_CHARS_MAX} lower-case letters, digits and inner . _ -"
_VALUE_WORDS = f"1 to {VALUE_CHARS_MAX} letters, digits and inner . _ -"

Layout = tuple[tuple[str, tuple[str, ...]], ...]  # keys with their values; none: a bare key


# -- what somebody wrote -------------------------------------------------------------------------


def read(texts: Iterable[str]) -> tuple[str, ...]:
    """Labels of one node, sorted; of two with the same key the later one holds."""
    found = {_key_of(text): check(text) for text in texts}
    labels = tuple(found[key] for key in sorted(found))
    check_size(labels)
    return labels


def read_layout(text: str) -> Layout:
    """`site=a,rack=r1/r2,ssd`; "" is none."""
    rows: dict[str, tuple[str, ...]] = {}
    for part in text.split(",") if text else ():
        key, equals, values = part.strip().partition("=")
        each = tuple(values.split("/")) if equals else ()
        for value in each or ("",):
            check(f"{key}={value}" if equals else key)
        if key in rows:
            raise ConfigError(f"the label {key} stands twice.", "Keep one of them.")
        rows[key] = each
    check_size([f"{key}={max(values, key=len)}" if values else key for key, values in rows.items()])
    return tuple(rows.items())


def read_wishes(texts: Iterable[str]) -> tuple[str, ...]:
    """Wishes as a demand has them; `key!=value` is another way to write `!key=value`."""
    found = []
    for text in texts:
        wish = text.strip()
        if "!=" in wish:
            wish = "!" + wish.replace("!=", "=", 1)
        try:
            _check_words(wish.removeprefix("!"))
        except ConfigError as fault:
            raise Refused(
                f"{text[:80]!r} is no wish: {fault.message}",
                "Write KEY=VALUE, KEY, !KEY or KEY!=VALUE, such as site=lab.",
            ) from None
        found.append(wish)
    if len(found) > WISHES_MAX:
        raise Refused(f"{len(found)} wishes are too many: at most {WISHES_MAX}.", "Ask for less.")
    return tuple(dict.fromkeys(found))


def check_size(labels: Sequence[str]) -> None:
    """Whether a node may have so many: `ConfigError` where not."""
    if len(labels) > LABELS_MAX:
        raise ConfigError(f"a node has at most {LABELS_MAX} labels, not {len(labels)}.")
    if (size := sum(len(label) + 1 for label in labels)) > BYTES_MAX:
        raise ConfigError(
            f"the labels of one node take {size} bytes, of at most {BYTES_MAX}.",
            "Shorten them, or leave some out.",
        )


def check(text: str) -> str:
    """`text` where it is a label that may be given; `ConfigError` where not."""
    _check_words(text)
    key = _key_of(text)
    if key in FACTS:
        raise ConfigError(
            f"{key} is no label to give: every node tells it of itself.", "Choose another key."
        )
    return text


def _check_words(text: str) -> None:
    key, equals, value = text.partition("=")
    if not _KEY.match(key) or len(key) > KEY_CHARS_MAX:
        raise ConfigError(f"the label {text[:80]!r} has a wrong key: {_KEY_WORDS} are wanted.")
    if equals and (not _VALUE.match(value) or len(value) > VALUE_CHARS_MAX):
        raise ConfigError(f"the label {text[:80]!r} has a wrong value: {_VALUE_WORDS} are wanted.")


def _key_of(label: str) -> str:
    return label.partition("=")[0]


# -- what is right -------------------------------------------------------------------------------


def show_layout(layout: Layout) -> str:
    """As it is written in braces of YAML."""
    texts = []
    for key, values in layout:
        quoted = [f'"{each}"' if each.lower() == "null" else each for each in values]
        several = f"[{', '.join(quoted)}]" if len(quoted) > 1 else "".join(quoted)
        texts.append(f"{key}: {several}" if values else key)
    return "{" + ", ".join(texts) + "}"


def of_node(layout: Layout, number: int) -> tuple[str, ...]:
    """The labels of node `number` (from 1 on) of a class: the values of a key go round."""
    return tuple(
        sorted(
            f"{key}={values[(number - 1) % len(values)]}" if values else key
            for key, values in layout
        )
    )


def merged(labels: Iterable[str], more: Iterable[str]) -> tuple[str, ...]:
    """`labels` with `more` in their place where the keys are the same."""
    found = {_key_of(each): each for each in (*labels, *more)}
    return tuple(found[key] for key in sorted(found))


def without(labels: Iterable[str], keys: Iterable[str]) -> tuple[str, ...]:
    """`labels` but for those with one of `keys`."""
    gone = list(keys)
    return tuple(each for each in labels if _key_of(each) not in gone)


def has_key(labels: Iterable[str], key: str) -> bool:
    """Whether one of them is of `key`, with a value or bare."""
    return any(_key_of(each) == key for each in labels)


def value(labels: Iterable[str], key: str) -> str:
    """What a node says of `key`; "" where it says nothing."""
    for each in labels:
        name, _, found = each.partition("=")
        if name == key:
            return found
    return ""


def facts(node_class: str, arch: str, gpu: bool) -> tuple[str, ...]:
    """What a node is by itself, in the words of labels."""
    found = [f"class={node_class}"]
    if arch:
        found.append(f"arch={arch}")
    if gpu:
        found.append("gpu")
    return tuple(found)


def meets(has: Iterable[str], wish: str) -> bool:
    """Whether a node with these labels and facts is what is wished for."""
    wanted = wish.removeprefix("!")
    if "=" in wanted:
        found = any(each == wanted for each in has)
    else:
        found = any(_key_of(each) == wanted for each in has)
    return found != wish.startswith("!")


def others(everybody: Iterable[Iterable[str]], wish: str) -> str:
    """What there is of the key of a wish that nobody meets, for people."""
    key = _key_of(wish.removeprefix("!"))
    found: dict[str, None] = {}
    for has in everybody:
        found.update({each: None for each in has if _key_of(each) == key})
    if not found:
        return f"no node has a label {key}"
    return "there is " + ", ".join(sorted(found)[:8]) + (", …" if len(found) > 8 else "")
