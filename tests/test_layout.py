"""The one file stays a pleasant house: sections in order, nothing foreign, every door labelled."""

from __future__ import annotations

import ast
import dis
import importlib.util
import re
import sys
import sysconfig
from types import CodeType
from typing import Any, Dict, Iterator, List, NamedTuple, Set, Tuple

import pytest
from conftest import PROGRAM

MAX_LINES = 10040  # issue 9 asked for 7,750: simplify before raising this
PROCESS_STATE = {"os.environ", "os.environb", "os.getenv", "os.putenv", "sys.argv"}
ALLOWED_OUTSIDE = {"default_db_path"}  # its default is part of the schema document's API
_BANNER = re.compile(r"^# -{3,}\n# (\S.*)\n# -{3,}$", re.MULTILINE)


class Section(NamedTuple):
    title: str
    statements: List[ast.stmt]


class _RuntimeOnly(ast.NodeTransformer):
    """Takes out what never runs: annotations, and what stands under `if TYPE_CHECKING`."""

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse or ast.copy_location(ast.Pass(), node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        self.generic_visit(node)
        node.annotation = ast.copy_location(ast.Constant(""), node.annotation)
        return node

    def visit_arg(self, node: ast.arg) -> Any:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        self.generic_visit(node)
        node.returns = None
        return node


def sections_of(source: str) -> List[Section]:
    """Return the sections in order; what stands above the first banner belongs to ''."""
    found = [Section("", [])]
    banners = [(source.count("\n", 0, m.start()), m.group(1)) for m in _BANNER.finditer(source)]
    for statement in _RuntimeOnly().visit(ast.parse(source)).body:
        while banners and banners[0][0] < statement.lineno:
            found.append(Section(banners.pop(0)[1], []))
        found[-1].statements.append(statement)
    return found + [Section(title, []) for _, title in banners]


def defined_names(statement: ast.stmt) -> Set[str]:
    """Return the module's names that a top-level statement binds; imports aside."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.If, ast.Try, ast.With)):
        inner = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
        return {name.id for name in inner if isinstance(name.ctx, ast.Store)}
    return set()


def used_names(statement: ast.stmt) -> Set[str]:
    """Return the module's names that a statement looks up, as the compiler resolves them."""

    def walk(code: CodeType) -> Iterator[str]:
        steps = list(dis.get_instructions(code))
        own = {step.argval for step in steps if step.opname == "STORE_NAME"}
        for step in steps:
            if step.opname.endswith("_GLOBAL") or (
                step.opname == "LOAD_NAME" and step.argval not in own
            ):
                yield step.argval
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from walk(constant)

    module = ast.Module([statement], [])
    return set(walk(compile(ast.fix_missing_locations(module), "<section>", "exec")))


def forward_references(source: str) -> List[str]:
    """Return every use, in a section, of a name that only a later section defines."""
    sections = sections_of(source)
    home: Dict[str, int] = {}
    for number, section in enumerate(sections):
        for statement in section.statements:
            for name in defined_names(statement):
                home.setdefault(name, number)
    return [
        f"{section.title} (line {statement.lineno}) uses {name} of {sections[home[name]].title}"
        for number, section in enumerate(sections)
        for statement in section.statements
        for name in sorted(used_names(statement))
        if home.get(name, 0) > number
    ]


def process_state_uses(source: str) -> List[str]:
    """Return the uses of the environment and of argv outside of the places that may see them."""
    found = []
    for section in sections_of(source):
        for statement in section.statements:
            if section.title == "Command line" or getattr(statement, "name", "") in ALLOWED_OUTSIDE:
                continue
            for node in ast.walk(statement):
                names: List[str] = []
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    names = [f"{node.value.id}.{node.attr}"]
                elif isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [
                    f"{section.title} (line {statement.lineno}) uses {name}"
                    for name in names
                    if name in PROCESS_STATE
                ]
    return found


def undocumented(source: str) -> List[str]:
    """Return the public functions and classes without a docstring."""
    return [
        f"{node.name} (line {node.lineno})"
        for node in ast.parse(source).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]


def foreign_imports(source: str) -> List[str]:
    """Return the imported top-level modules that the standard library does not have."""
    modules: Set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or "").partition(".")[0])
    return sorted(module for module in modules if not _is_standard(module))


def _is_standard(module: str) -> bool:
    if module.startswith("."):
        return False
    if module in sys.builtin_module_names:
        return True
    spec = importlib.util.find_spec(module)
    origin = (spec and spec.origin) or ""
    if origin in ("built-in", "frozen"):
        return True
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    return origin.startswith(tuple(f"{folder}/" for folder in standard)) and (
        "site-packages" not in origin
    )


def table_of_contents(source: str) -> List[str]:
    """Return the section names that the module's docstring lists: 'Name    what it holds'."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return re.findall(r"^ {4}(\S+(?: \S+)*) {2,}\S", docstring, re.MULTILINE)


@pytest.fixture(scope="module")
def source() -> str:
    return PROGRAM.read_text(encoding="utf-8")


def test_each_section_uses_only_the_ones_above_it(source: str) -> None:
    assert forward_references(source) == []


def test_the_docstring_lists_exactly_the_banners(source: str) -> None:
    banners = [section.title for section in sections_of(source)[1:]]
    assert len(banners) > 5
    assert len(set(banners)) == len(banners)
    assert table_of_contents(source) == banners


def test_no_section_is_empty(source: str) -> None:
    assert [section.title for section in sections_of(source) if not section.statements] == []


def test_nothing_but_the_standard_library(source: str) -> None:
    assert foreign_imports(source) == []


def test_only_the_command_line_sees_the_environment_and_argv(source: str) -> None:
    assert process_state_uses(source) == []


def test_public_names_have_docstrings(source: str) -> None:
    assert ast.get_docstring(ast.parse(source))
    assert undocumented(source) == []


def test_the_file_is_not_too_long(source: str) -> None:
    assert len(source.splitlines()) <= MAX_LINES


RULE = "# " + "-" * 20 + "\n"
SYNTHETIC = f'''"""A program.

    Low     what the others use
    High    the rest

More.
"""
from __future__ import annotations
import os, sys
{RULE}# Low
{RULE}
LIMIT = 3
def public(): {{low}}
{RULE}# High
{RULE}
TOP, SECOND = 1, 2
class Engine:
    """Works."""
    def start(self): return public() + LIMIT
{RULE}# Command line
{RULE}
def main():
    """Run."""
    return sys.argv, os.environ, Engine
'''


@pytest.mark.parametrize(
    ("low", "names"),
    [
        ("return Engine", ["Engine"]),
        ("return lambda: [SECOND for _ in TOP]", ["SECOND", "TOP"]),
        ("global TOP; TOP = 2", ["TOP"]),
        ("\n    class Inner(Engine): pass", ["Engine"]),
        ("\n    def inner(x=TOP): return x", ["TOP"]),
        ("TOP = 1; return TOP", []),
        ("x: Engine = LIMIT; return [TOP for TOP in x]", []),
        ("\n    def inner(x: Engine, *y: TOP) -> SECOND: return x", []),
        ("\n    if TYPE_CHECKING: Engine()", []),
        ("return self.TOP", []),
    ],
)
def test_the_checker_catches_forward_references(low: str, names: List[str]) -> None:
    found = forward_references(SYNTHETIC.replace("{low}", low))
    assert [line.split(" uses ")[1].split(" of ")[0] for line in found] == names


@pytest.mark.parametrize(
    ("low", "found"),
    [
        ("return os.environ.get('X')", ["os.environ"]),
        ("return sys.argv[0], os.getenv('X')", ["sys.argv", "os.getenv"]),
        ("from os import environ", ["os.environ"]),
        ("return os.path", []),
    ],
)
def test_the_checker_catches_process_state(low: str, found: List[str]) -> None:
    lines = process_state_uses(SYNTHETIC.replace("{low}", low))
    assert [line.split(" uses ")[1] for line in lines] == found


def test_process_state_is_allowed_in_the_default_path() -> None:
    allowed = SYNTHETIC.replace("{low}", "return os.environ").replace(
        "def public", "def default_db_path"
    )
    assert process_state_uses(allowed) == []


@pytest.mark.parametrize(
    ("statement", "foreign"),
    [
        ("import os.path, requests", ["requests"]),
        ("from pytest import raises", ["pytest"]),
        ("from . import helper", ["."]),
        ("def f():\n    import yaml.loader", ["yaml"]),
        ("import sqlite3, _thread, sys, json.decoder", []),
    ],
)
def test_the_checker_catches_foreign_imports(statement: str, foreign: List[str]) -> None:
    assert foreign_imports(statement) == foreign


def test_the_checker_reads_banners_contents_and_docstrings() -> None:
    text = SYNTHETIC.replace("{low}", "pass")
    assert [section.title for section in sections_of(text)] == ["", "Low", "High", "Command line"]
    assert table_of_contents(text) == ["Low", "High"]  # "Command line" is forgotten there
    names: Tuple[str, ...] = tuple(entry.split()[0] for entry in undocumented(text))
    assert names == ("public",)
