"""Measure how easy a checkout is to live in: the way of two commands through it, sizes, duplicate names, circles.

    python tests/layout.py                          the checkout that this file lies in
    python tests/layout.py PATH --csv FILE          another one, and the columns of an exported CSV file
    python tests/layout.py PATH --no-run            only what can be read from the source

Prints plain text; nothing is written into the checkout. The figures are signs, not targets.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = "mmtok_cli"
COMMANDS = {
    "infer": ["infer", "example.png", "What color is the star?", "--budget", "16"],
    "compare": "compare --methods mmtok --limit 4 --budget 16 --warmup 0 --runs 2 --run-dir run".split(),
}
LARGEST = 15  # functions listed
IS_FUNCTION = 0x01  # CO_OPTIMIZED: set for functions, not for the bodies of modules and classes


# --- The way of a command -------------------------------------------------------------------------------------------


def trace(arguments: Sequence[str], package: Path, output: Path) -> None:
    """Run the command line in this process and write what it called of the package, in the order of first calls.

    Writes JSON: `calls`, a list of [file, line, name], and `loaded`, the files that were imported.
    """
    first_calls: dict[tuple[str, int, str], None] = {}
    prefix = str(package) + os.sep

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code.co_filename.startswith(prefix) and code.co_flags & IS_FUNCTION:
                first_calls.setdefault((code.co_filename, code.co_firstlineno, code.co_name))

    sys.argv = ["mmtok", *arguments]
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        from mmtok_cli.cli.main import main

        main()
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    loaded = [str(Path(file).relative_to(package)) for file in files if file and file.startswith(prefix)]
    calls = [[str(Path(file).relative_to(package)), line, name] for file, line, name in first_calls]
    output.write_text(json.dumps({"calls": calls, "loaded": loaded}), encoding="utf-8")


def ways(checkout: Path) -> Iterator[str]:
    """Files and functions that each command calls. Inner functions count; lambdas and comprehensions do not."""
    for arguments in COMMANDS.values():
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            picture = checkout / PACKAGE / "demo" / "example.png"
            (place / "example.png").write_bytes(picture.read_bytes())
            path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
            done = subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), str(checkout), "--trace", "calls.json", *arguments],
                cwd=place,
                env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                text=True,
            )
            yield f"mmtok {' '.join(arguments)}"
            if done.returncode:
                yield f"  failed with status {done.returncode}: {done.stderr.strip()[-300:]}"
                continue
            found = json.loads((place / "calls.json").read_text(encoding="utf-8"))
            everything = [file for file, _, _ in found["calls"]]
            calls = [(file, line, called) for file, line, called in found["calls"] if not called.startswith("<")]
            files = [file for file, _, _ in calls]
            switches = count_switches(files)
            yield (
                f"  {len(set(files))} files and {len(calls)} functions called, {switches} switches between files on "
                f"first calls; {len(found['loaded'])} files loaded; with lambdas and comprehensions {len(everything)} "
                f"functions, {count_switches(everything)} switches"
            )
            by_folder: dict[str, list[str]] = defaultdict(list)
            for file in files:
                by_folder[folder_of(file)].append(file)
            for folder, inside in sorted(by_folder.items(), key=lambda pair: -len(pair[1])):
                yield f"    {folder:16} {len(set(inside)):3} files {len(inside):4} functions"


def count_switches(files: Sequence[str]) -> int:
    return sum(here != there for here, there in pairwise(files))


# --- What the source says -------------------------------------------------------------------------------------------


@dataclass
class Source:
    """One file. lines by kind: a line with code counts as code, whatever else is on it; docstrings are not code."""

    path: str  # within the package
    tree: ast.Module
    lines: int = 0
    code: int = 0
    docstrings: int = 0
    comments: int = 0  # on a line of their own
    trailing: int = 0  # behind code


@dataclass
class Function:
    place: str
    name: str
    lines: int
    parameters: int
    is_command: bool = field(default=False)


def folder_of(path: str) -> str:
    """The first folder within the package; files that lie directly in it belong to "." ."""
    first, *rest = Path(path).parts
    return first if rest else "."


def sources(checkout: Path) -> list[Source]:
    package = checkout / PACKAGE
    return [read_source(path, package) for path in sorted(package.rglob("*.py"))]


def read_source(path: Path, package: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    source = Source(str(path.relative_to(package)), ast.parse(text), lines=len(text.splitlines()))
    docstrings: set[int] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    silent = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT)
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in silent:
            code.update(range(token.start[0], token.end[0] + 1))
    code -= docstrings
    source.code, source.docstrings = len(code), len(docstrings)
    source.comments, source.trailing = len(comments - code), len(comments & code)
    return source


def functions(found: Sequence[Source]) -> list[Function]:
    """All functions and methods. lines: with docstring, without decorators. self and cls are no parameters."""
    listed = []
    for source in found:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                a = node.args
                names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
                names = [name for name in names if name not in ("self", "cls")]
                count = len(names) + (a.vararg is not None) + (a.kwarg is not None)
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                place = f"{source.path}:{node.lineno}"
                listed.append(Function(place, node.name, lines, count, is_command(node)))
    return listed


def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether parameters are options of the command line: Typer's, or named as such."""
    for parameter in (*node.args.args, *node.args.kwonlyargs):
        said = ast.unparse(parameter.annotation) if parameter.annotation else ""
        if re.search(r"(^|\W)typer\.(Option|Argument)|^\w*(Option|Argument)\b", said):
            return True
    return False


def sizes(found: Sequence[Source]) -> Iterator[str]:
    listed = functions(found)
    lines = sorted(f.lines for f in listed)
    long, wide = sum(f.lines > 50 for f in listed), sum(f.parameters > 8 and not f.is_command for f in listed)
    yield f"{len(listed)} functions; {long} of more than 50 lines; median {lines[len(lines) // 2]} lines"
    yield f"{wide} functions with more than 8 parameters, commands aside"
    yield "largest:"
    for f in sorted(listed, key=lambda f: -f.lines)[:LARGEST]:
        yield f"  {f.lines:4} lines  {f.parameters:2} parameters  {f.place} {f.name}"
    for title, chosen in (
        ("most parameters, commands:", [f for f in listed if f.is_command]),
        ("most parameters, other functions:", [f for f in listed if not f.is_command]),
    ):
        yield title
        for f in sorted(chosen, key=lambda f: -f.parameters)[:LARGEST]:
            yield f"  {f.parameters:2} parameters  {f.lines:4} lines  {f.place} {f.name}"


def folders(found: Sequence[Source]) -> Iterator[str]:
    groups: dict[str, list[Source]] = defaultdict(list)
    for source in found:
        groups[folder_of(source.path)].append(source)
    yield (
        f"{'folder':14} {'files':>5} {'lines':>6} {'code':>6} {'docstrings':>10} {'comments':>8} {'per 100 lines':>13} "
        f"{'per 100 code':>12} {'trailing':>8}  largest file"
    )
    for name, inside in [*sorted(groups.items()), ("all", list(found))]:
        lines, code, comments = (sum(getattr(s, kind) for s in inside) for kind in ("lines", "code", "comments"))
        docstrings, trailing = (sum(getattr(s, kind) for s in inside) for kind in ("docstrings", "trailing"))
        largest = max(inside, key=lambda s: s.lines)
        yield (
            f"{name:14} {len(inside):5} {lines:6} {code:6} {docstrings:10} {comments:8} {100 * comments / lines:13.2f} "
            f"{100 * comments / max(code, 1):12.2f} {trailing:8}  {largest.path} {largest.lines}"
        )
    lengths = sorted(s.lines for s in found)
    yield f"lines of a file: median {lengths[len(lengths) // 2]}, 90th percentile {lengths[9 * len(lengths) // 10]}"


# --- Names and circles ----------------------------------------------------------------------------------------------


def same_names(found: Sequence[Source]) -> Iterator[str]:
    """Top-level names that are defined in several files: classes and type aliases, functions, constants."""
    places: dict[str, dict[str, list[str]]] = {kind: defaultdict(list) for kind in ("class", "function", "constant")}
    for source in found:
        for kind, name, line in top_level(source.tree):
            places[kind][name].append(f"{source.path}:{line}")
    for kind, title in (
        ("class", "classes and type aliases"),
        ("function", "functions"),
        ("constant", "constants"),
    ):
        shared = {name: at for name, at in places[kind].items() if len({p.rsplit(":", 1)[0] for p in at}) > 1}
        yield f"{title} of one name in several files: {len(shared)}"
        for name, at in sorted(shared.items(), key=lambda pair: (pair[0].startswith("_"), -len(pair[1]), pair[0])):
            yield f"  {name}: {', '.join(at)}"


def top_level(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield "class", node.name, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "function", node.name, node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and not target.id.startswith("__"):
                    yield "constant" if target.id.isupper() else "class", target.id, node.lineno


def imports(found: Sequence[Source]) -> dict[str, dict[str, set[str]]]:
    """module -> kind -> modules of the package that it imports. Kinds: top, deferred (in functions), typing."""
    modules = {module_of(source.path): source for source in found}
    graph: dict[str, dict[str, set[str]]] = {}
    for module, source in modules.items():
        edges: dict[str, set[str]] = {"top": set(), "deferred": set(), "typing": set()}
        collect(source.tree, "top", edges, modules)
        for kind in edges.values():
            kind.discard(module)
        graph[module] = edges
    return graph


def module_of(path: str) -> str:
    parts = [PACKAGE, *Path(path).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def collect(node: ast.AST, kind: str, edges: dict[str, set[str]], modules: Iterable[str]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                target = name if name in modules else child.module
                if target in modules:
                    edges[kind].add(target)
        elif isinstance(child, ast.Import):
            edges[kind].update(alias.name for alias in child.names if alias.name in modules)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for inner in child.body:
                collect(ast.Module([inner], []), "typing", edges, modules)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            collect(child, "deferred" if kind == "top" else kind, edges, modules)
        else:
            collect(child, kind, edges, modules)


def circles(found: Sequence[Source]) -> Iterator[str]:
    graph = imports(found)
    for title, kinds in (
        ("modules, imports at the top", ("top",)),
        ("modules, imports in functions too", ("top", "deferred")),
        ("modules, imports for types too", ("top", "deferred", "typing")),
    ):
        edges = {module: set[str]().union(*(of[kind] for kind in kinds)) for module, of in graph.items()}
        yield from report_circles(title, edges)
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, of in graph.items():
        for target in of["top"] | of["deferred"] | of["typing"]:
            here, there = room_of(module), room_of(target)
            if here != there:
                rooms[here].add(there)
    yield from report_circles("folders and files of the top level, all imports", rooms)
    yield "who imports whom (all imports):"
    for here in sorted(rooms):
        yield f"  {here} -> {', '.join(sorted(rooms[here]))}"


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def report_circles(title: str, edges: dict[str, set[str]]) -> Iterator[str]:
    rings = [ring for ring in components(edges) if len(ring) > 1]
    yield f"circles of {title}: {len(rings)}"
    for ring in rings:
        names = sorted(ring)
        inner = [f"{short(a)}->{short(b)}" for a in names for b in sorted(edges.get(a, ())) if b in ring]
        yield f"  {len(ring)}: {', '.join(inner[:24])}{' …' if len(inner) > 24 else ''}"


def short(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.")


def components(edges: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected parts of a graph: those that can be reached from each other."""
    reach = {node: reachable(node, edges) for node in edges}
    found: list[set[str]] = []
    for node in edges:
        ring = {node} | {other for other in reach[node] if node in reach.get(other, ())}
        if ring not in found:
            found.append(ring)
    return found


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in edges.get(waiting.pop(), ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def columns(path: Path) -> Iterator[str]:
    """How many columns of a CSV file say anything."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])
    empty = [name for name in names if not any(row[name] for row in rows)]
    constant = [name for name in names if name not in empty and len({row[name] for row in rows}) == 1]
    yield f"{path.name}: {len(rows)} rows, {len(names)} columns, {len(empty)} empty, {len(constant)} constant"
    yield f"  empty: {' '.join(empty) or '-'}"
    yield f"  constant: {' '.join(constant) or '-'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--csv", type=Path, help="an exported CSV file whose columns are counted")
    parser.add_argument("--no-run", action="store_true", help="read the source, and run nothing")
    parser.add_argument("--trace", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    checkout = given.checkout.resolve()
    if given.trace:
        output, *arguments = given.trace
        trace(arguments, checkout / PACKAGE, Path(output))
        return
    found = sources(checkout)
    parts: list[tuple[str, Iterable[str]]] = [
        ("The way of a command", [] if given.no_run else ways(checkout)),
        ("Sizes of functions", sizes(found)),
        ("Folders", folders(found)),
        ("One name, several meanings", same_names(found)),
        ("Import circles", circles(found)),
        ("Columns of the CSV file", columns(given.csv) if given.csv else []),
    ]
    for title, lines in parts:
        sys.stdout.write(f"\n== {title}\n")
        for line in lines:
            sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
