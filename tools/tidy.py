"""Style is a test: the rules of docs/ARCHITECTURE.md that a reader of one file cannot see.

`python -m manifold.tools.tidy [ROOT]` prints one line per finding, `file:line: what and what to
do`, and exits with 1 where there is any. Nothing is imported or run: everything is read from the
syntax trees. What is allowed in spite of a rule stands in tools/ratchet.txt.

Rules: T1 imports point down the floors and down the kernel's own order. T2 pure files neither
import nor call what could make two runs differ. T3 no circle of modules. T4 sizes, as a ratchet.
T5 every module says what it is. T6 nothing swallows errors or catches our bugs. T7 nobody sleeps.
T8 every module is used. T9 imports are absolute and explicit.
Source: TigerBeetle's src/tidy.zig (style as a test, the ratchet).
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FLOORS = {"vm": 0, "kernel": 1, "shells": 2, "images": 3, "tools": 3, "": 4}  # "" is src/manifold

# Inside the kernel; what is not named here: a folder is a subsystem, a file is at node's height.
ORDER = {
    **dict.fromkeys(
        ("config", "config_units", "config_loader", "config_reader", "config_document"), 1
    ),
    **dict.fromkeys(("effects", "limits", "errors", "durable", "places", "identity", "traces"), 1),
    "labels": 1,
    **dict.fromkeys(("inventory", "otel", "rendezvous", "tasks"), 1),
    **dict.fromkeys(("geode", "process"), 2),
    **dict.fromkeys(("scheduler", "nexus", "membership", "memory", "hyperbus", "keg", "mayor"), 3),
    "registry": 3,
    "observe": 4,  # it reads a whole node
    "main": 5,
}
SUBSYSTEM, NODE = 3, 4
# What shells may import of the kernel, beside every messages.py.
SHELLS_MAY = ("config", "errors", "hyperbus", "labels", "places", "tasks", "traces")

PURE_FOLDERS = ("geode",)  # pure without a protocol.py; folders with one are found
# fmt: off
IMPURE_MODULES = frozenset({
    "time", "random", "asyncio", "socket", "os", "logging",
    "threading", "datetime", "secrets", "uuid", "subprocess", "select",
    "signal", "multiprocessing", "concurrent", "tempfile", "shutil", "pathlib",
    "sqlite3", "io", "pynng", "uvloop", "psutil",
})
# fmt: on
IMPURE_CALLS = frozenset({"open", "print", "input", "id", "hash"})
PURE_FROM = {"random": {"Random"}}  # the type of what is injected
ORDERLESS = frozenset({"sorted", "len", "set", "frozenset", "any", "all", "sum"})  # order unseen
ORDERING = frozenset({"list", "tuple", "iter", "enumerate", "zip", "map", "filter"})

FUNCTION_LINES_MAX = 70  # a screen
FILE_LINES_MAX = 600
RATCHET = "tools/ratchet.txt"
REGISTRIES = ("tools/bench/", "images/board/")  # found by file name, imported by nobody
TEST_ONLY = frozenset({"tests", "conftest", "pytest", "hypothesis"})
NAME_OF_MODULE = re.compile(r"manifold(?:\.[a-z_0-9]+)+")


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: `target` is the module it comes from, as far as we have it."""

    target: str
    name: str
    line: int
    for_types: bool


@dataclass(slots=True)
class Source:
    """A file of ours: its path from the root, its module name, its tree and its imports."""

    path: str
    module: str
    text: str
    tree: ast.Module
    imports: list[Import] = field(default_factory=list)

    @property
    def floor(self) -> str:
        head = self.path.split("/")[0]
        return head if head in FLOORS else ""

    @property
    def unit(self) -> str:
        """The folder or file of the kernel that this belongs to."""
        return self.path.split("/")[1].removesuffix(".py")


Sources = dict[str, Source]


def tidy(root: Path) -> list[Finding]:
    """Every finding under `root`, in order."""
    sources, findings = read(root)
    for source in sources.values():
        for check in (imports_point_down, purity, says_what_it_is, swallowing, explicit_imports):
            findings += check(source, sources)
    findings += circles(sources)
    findings += dead(sources, root)
    findings += ratchet(sources, root)
    return sorted(set(findings))


# --- reading ----------------------------------------------------------------------------------


def read(root: Path) -> tuple[Sources, list[Finding]]:
    """All sources under the floors by module name, and what could not be read."""
    sources: Sources = {}
    findings = []
    for path in sorted(_files(root)):
        relative = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, FileNotFoundError) as fault:
            line = getattr(fault, "lineno", None) or 1
            findings.append(Finding(relative, line, "is not Python; make it parse"))
            continue
        module = _module(relative)
        sources[module] = Source(relative, module, text, tree)
    for source in sources.values():
        source.imports = list(_imports(source.tree, sources))
    return sources, findings


def _files(root: Path) -> Iterator[Path]:
    for folder in ("src/manifold", *(floor for floor in FLOORS if floor)):
        for where, folders, names in os.walk(root / folder):  # links are not followed
            folders[:] = [each for each in folders if each != "__pycache__"]
            yield from (Path(where, name) for name in names if name.endswith(".py"))


def _module(relative: str) -> str:
    name = relative.removeprefix("src/manifold/").removesuffix(".py").replace("/", ".")
    name = name.removesuffix("__init__").rstrip(".")
    return f"manifold.{name}".rstrip(".")


def _imports(tree: ast.Module, sources: Sources) -> Iterator[Import]:
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        types = id(node) in for_types
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", node.lineno, types)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                target = inner if inner in sources else node.module
                yield Import(target, alias.name, node.lineno, types)


# --- T1: floors and the kernel's order --------------------------------------------------------


def imports_point_down(source: Source, sources: Sources) -> Iterator[Finding]:
    for each in source.imports:
        reason = _upward(source, each)
        if reason:
            yield Finding(source.path, each.line, reason)


def _upward(source: Source, each: Import) -> str:
    words = each.target.split(".")
    if words[0] in TEST_ONLY and "pytest" not in source.path:
        return f"imports {each.target}, which is for tests; move it to tests/"
    if words[0] in FLOORS:
        return f"imports {each.target}; import manifold.{each.target}"
    if words[0] != "manifold" or source.floor == "":
        return ""
    floor = words[1] if len(words) > 1 and words[1] in FLOORS else ""
    if FLOORS[floor] > FLOORS[source.floor] or (
        FLOORS[floor] == FLOORS[source.floor] and floor != source.floor
    ):
        here = f"{source.floor}/ may import only what is beneath it"
        return f"imports {each.target}, but {here}; move one of them or pass it in"
    if source.floor == "shells" and floor == "kernel" and not _for_shells(words):
        return (
            f"imports {each.target}; shells take of the kernel only {', '.join(SHELLS_MAY)} and "
            "messages.py"
        )
    if source.floor == "kernel" and floor == "kernel" and len(words) > 2:
        return _against_order(source, words, each.target)
    return ""


def _for_shells(words: list[str]) -> bool:
    return len(words) > 2 and (words[2] in SHELLS_MAY or words[-1] == "messages")


def _rank(unit: str, is_file: bool) -> int:
    return ORDER.get(unit, NODE if is_file else SUBSYSTEM)


def _against_order(source: Source, words: list[str], target: str) -> str:
    unit = words[2]
    if unit == source.unit:
        return ""
    own = _rank(source.unit, source.path.count("/") == 1)
    other = _rank(unit, len(words) == 3 and unit not in ORDER)
    if other > own:
        return f"imports {target}, which is above {source.unit}; pass it in, or move it down"
    if other == own and own in (2, 3) and words[-1] not in ("messages", "ask"):
        return (
            f"imports {target} of its sibling {unit}; take only its messages.py, or let node "
            "bring them together"
        )
    return ""


# --- T2: pure files ---------------------------------------------------------------------------


def is_pure(source: Source, sources: Sources) -> bool:
    """Whether the file belongs to a protocol: to a folder with one, and is not what drives it."""
    parts = source.path.split("/")
    if parts[0] != "kernel" or len(parts) < 3:
        return False
    driver = parts[-1].removesuffix(".py").split("_")
    if "driver" in (driver[0], driver[-1]) or driver[0] == "storage":  # sockets, and disks
        return False
    return parts[1] in PURE_FOLDERS or f"manifold.kernel.{parts[1]}.protocol" in sources


def purity(source: Source, sources: Sources) -> Iterator[Finding]:
    if not is_pure(source, sources):
        return
    advice = "take it as an argument, or move this to driver.py"
    for each in source.imports:
        head = each.target.split(".")[0]
        if head in IMPURE_MODULES and each.name not in PURE_FROM.get(head, ()):
            yield Finding(source.path, each.line, f"a pure file imports {head}; {advice}")
        if each.target.split(".")[-1] == "driver" and head == "manifold":
            yield Finding(source.path, each.line, f"a pure file imports a driver; {advice}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and _callee(node) in IMPURE_CALLS:
            yield Finding(source.path, node.lineno, f"a pure file calls {_callee(node)}; {advice}")
    for line in sorted(set(_set_iterations(source.tree))):
        yield Finding(
            source.path, line, "the order of a set differs between runs; use sorted() or a dict"
        )


def _callee(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _set_iterations(tree: ast.Module) -> Iterator[int]:
    """Lines where the order of a set can show."""
    names = _set_names(tree)
    calm = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _callee(node) in ORDERLESS
        for argument in node.args
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.AsyncFor) and _is_set(node.iter, names):
            yield node.lineno
        elif isinstance(node, ast.ListComp | ast.DictComp | ast.GeneratorExp):
            if id(node) not in calm and any(_is_set(each.iter, names) for each in node.generators):
                yield node.lineno
        elif isinstance(node, ast.Starred):
            if _is_set(node.value, names):
                yield node.lineno
        elif isinstance(node, ast.Call) and _shows_order(node, names):
            yield node.lineno


def _shows_order(node: ast.Call, names: frozenset[str]) -> bool:
    arguments = any(_is_set(each, names) for each in node.args)
    if isinstance(node.func, ast.Attribute):
        if node.func.attr == "pop" and not node.args:
            return _is_set(node.func.value, names)
        return node.func.attr in ("join", "extend", "fromkeys") and arguments
    with_key = _callee(node) in ("min", "max") and bool(node.keywords)  # ties go to the first
    return arguments and (_callee(node) in ORDERING or with_key)


def _is_set(node: ast.expr, names: frozenset[str]) -> bool:
    match node:
        case ast.Set() | ast.SetComp():
            return True
        case ast.Call():
            return _callee(node) in ("set", "frozenset")
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() | ast.BitXor()):
            return _is_set(left, names) or _is_set(node.right, names)
        case ast.Name():
            return node.id in names
        case ast.Attribute():
            return "." + node.attr in names
    return False


def _set_names(tree: ast.Module) -> frozenset[str]:
    """Names that are always sets in this file: `x`, and `.x` for attributes and fields.

    One binding to anything else clears a name: a doubtful finding is worse than none.
    """
    sets: set[str] = set()
    others: set[str] = set()
    in_class = {
        id(statement)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            (sets if _says_set(node.annotation) else others).add(node.arg)
        elif isinstance(node, ast.AnnAssign):
            dot = "." if id(node) in in_class else ""
            (sets if _says_set(node.annotation) else others).add(dot + _bound(node.target))
        elif isinstance(node, ast.Assign):
            is_set = _is_set(node.value, frozenset())
            (sets if is_set else others).update(_bound(target) for target in node.targets)
        elif isinstance(node, ast.For | ast.comprehension):
            others.update(each.id for each in ast.walk(node.target) if isinstance(each, ast.Name))
    return frozenset(sets - others)


def _says_set(annotation: ast.expr) -> bool:
    return re.match(r"(frozen)?set\b", ast.unparse(annotation)) is not None


def _bound(target: ast.expr) -> str:
    return "." + target.attr if isinstance(target, ast.Attribute) else ast.unparse(target)


# --- T3: circles ------------------------------------------------------------------------------


def circles(sources: Sources) -> Iterator[Finding]:
    """One finding per knot of modules that import one another, at whatever depth of a function."""
    graph = {
        module: sorted(
            {each.target for each in source.imports if not each.for_types}
            & sources.keys() - {module}  # a package's own name, where it imports a part of itself
        )
        for module, source in sources.items()
    }
    for knot in _knots(graph):
        first = min(knot)
        inside = [each for each in sources[first].imports if each.target in knot]
        chain = " -> ".join([*_loop(graph, first, set(knot)), first])
        line = inside[0].line if inside else 1
        yield Finding(
            sources[first].path, line, f"a circle: {chain}; move what they share beneath both"
        )


def _knots(graph: dict[str, list[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for target in graph[module]:
            if target not in number:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], number[target])
        if low[module] == number[module]:
            knot = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(knot) > 1:
                found.append(knot)

    for module in graph:
        if module not in number:
            visit(module)
    return found


def _loop(graph: dict[str, list[str]], start: str, knot: set[str]) -> list[str]:
    """A shortest way from `start` back to itself inside the knot."""
    ways = [[start]]
    seen = {start}
    for way in ways:
        for target in graph[way[-1]]:
            if target == start:
                return way
            if target in knot and target not in seen:
                seen.add(target)
                ways.append([*way, target])
    raise AssertionError("every module of a knot lies on a loop")


# --- T4 and T7: what may only shrink ----------------------------------------------------------


def ratchet(sources: Sources, root: Path) -> Iterator[Finding]:
    sizes, sleeps, findings = _allowed(root)
    yield from findings
    for source in sources.values():
        yield from _size(source.path, 1, len(source.text.splitlines()), FILE_LINES_MAX, sizes)
        for name, node in functions(source.tree):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            where = f"{source.path}:{name}"
            yield from _size(where, node.lineno, lines, FUNCTION_LINES_MAX, sizes)
        if source.floor in ("kernel", "shells", "tools"):
            for line in _sleeps(source):
                if sleeps.pop(source.path, None) is None:
                    text = "calls time.sleep; wait for an event, or give a reason in " + RATCHET
                    yield Finding(source.path, line, text)
                    break
    for where, (line, _) in sizes.items():
        yield Finding(RATCHET, line, f"{where} is within the limit or gone; remove this line")
    for path, line in sleeps.items():
        yield Finding(RATCHET, line, f"{path} does not sleep; remove this line")


def _size(
    where: str, line: int, lines: int, most: int, sizes: dict[str, tuple[int, int]]
) -> Iterator[Finding]:
    if lines <= most:
        return
    path, _, name = where.partition(":")
    listed, allowed = sizes.pop(where, (0, 0))
    what = f"{name} has" if name else "has"
    if lines > max(allowed, most):
        yield Finding(path, line, f"{what} {lines} lines of at most {allowed or most}; split it")
    elif lines < allowed:
        yield Finding(RATCHET, listed, f"{where} has shrunk; lower its {allowed} to {lines}")


def _allowed(root: Path) -> tuple[dict[str, tuple[int, int]], dict[str, int], list[Finding]]:
    """Sizes as `where: (line, size)`, sleeps as `path: line`, and lines that say neither."""
    sizes: dict[str, tuple[int, int]] = {}
    sleeps: dict[str, int] = {}
    findings = []
    path = root / RATCHET
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        match line.split(maxsplit=2):
            case []:
                pass
            case [comment, *_] if comment.startswith("#"):
                pass
            case [size, where] if size.isdigit():
                sizes[where] = (number, int(size))
            case ["sleep", where, _reason]:
                sleeps[where] = number
            case _:
                findings.append(Finding(RATCHET, number, "write `LINES PATH` or `sleep PATH WHY`"))
    return sizes, sleeps, findings


def functions(
    tree: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
            yield from functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def _sleeps(source: Source) -> Iterator[int]:
    named = any(each.target == "time" and each.name == "sleep" for each in source.imports)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and (
            ast.unparse(node.func) == "time.sleep" or (named and _callee(node) == "sleep")
        ):
            yield node.lineno


# --- T5, T6, T9: one file at a time -----------------------------------------------------------


def says_what_it_is(source: Source, _sources: Sources) -> Iterator[Finding]:
    if source.text.strip() and not ast.get_docstring(source.tree):
        yield Finding(source.path, 1, "has no docstring; say what it is for and what holds in it")


def swallowing(source: Source, _sources: Sources) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "BaseException"
            names = set(re.findall(r"\w+", caught))
            if "AssertionError" in names:
                yield Finding(
                    source.path, node.lineno, "catches AssertionError, our bug; let it go"
                )
            if names & {"Exception", "BaseException"} and all(map(_inert, node.body)):
                yield Finding(
                    source.path, node.lineno, f"swallows {caught}; name the error, or handle it"
                )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            for argument in node.args:
                if ast.unparse(argument) in ("Exception", "BaseException", "AssertionError"):
                    yield Finding(source.path, node.lineno, "suppresses any error; name it")


def _inert(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass | ast.Continue) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def explicit_imports(source: Source, _sources: Sources) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield Finding(source.path, node.lineno, "a relative import; write manifold.…")
        if isinstance(node, ast.ImportFrom) and any(each.name == "*" for each in node.names):
            yield Finding(source.path, node.lineno, "imports *; name what is used")


# --- T8: what nobody uses ---------------------------------------------------------------------


def dead(sources: Sources, root: Path) -> Iterator[Finding]:
    """Modules that no other module of ours imports or names; tests do not count."""
    used: set[str] = set()
    for source in sources.values():
        used |= {each.target for each in source.imports if each.target != source.module}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                used |= set(NAME_OF_MODULE.findall(node.value)) - {source.module}
    project = root / "pyproject.toml"
    used |= set(NAME_OF_MODULE.findall(project.read_text() if project.exists() else ""))
    for module, source in sources.items():
        is_package = source.path.endswith("__init__.py")
        runs_itself = source.path.endswith("__main__.py") or any(
            isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            for node in source.tree.body
        )
        registered = source.path.startswith(REGISTRIES)
        if not (is_package or runs_itself or registered or module in used):
            yield Finding(source.path, 1, "nobody imports it; use it or remove it")


def main(arguments: list[str]) -> int:
    """Print the findings; 1 where there are any."""
    here = Path(__file__).resolve().parents[1]
    findings = tidy(Path(arguments[0]) if arguments else here)
    for each in findings:
        print(each)
    print(f"{len(findings)} findings" if findings else "tidy", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
