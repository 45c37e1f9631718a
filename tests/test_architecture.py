"""ARCHITECTURE.md and CONTRIBUTING.md agree with the code: what they name exists, and the map leaves nothing out."""

import ast
import functools
import re
import tomllib
from pathlib import Path
from typing import Final, get_args

import pytest

from gpu_worker.requests import RequestState
from gpu_worker.residency.models import ModelState
from shared.protocol import PublicState
from shared.settings import load_settings, variable_of

ROOT: Final = Path(__file__).resolve().parents[1]
MAP: Final = (ROOT / ".github" / "ARCHITECTURE.md").read_text()
GUIDE: Final = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
README: Final = (ROOT / "README.md").read_text()
CODE: Final = ("server", "gpu_worker", "shared")

STATES: Final = [
    (MAP, "The states of a model", {state.name for state in ModelState}),
    (MAP, "The states of a request", {state.name for state in RequestState}),
    (README, "Where a model is", set(get_args(PublicState))),
]
"""Each state diagram: its page, its heading, and the states of the code."""

PATH: Final = re.compile(r"[\w.-]*/(?:[\w.-]+/)*(?:[\w-]+\.\w+)?|\w+\.(?:py|toml)")
NAMED: Final = re.compile(r"([\w/.]+\.py):([\w.]+)")
TYPE: Final = re.compile(r"([A-Z][a-z]\w*)(?:\.(\w+))?")


def spans(text: str) -> set[str]:
    """What stands between backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", text))


def section(heading: str, text: str = MAP) -> str:
    """The text under one heading."""
    return re.split(rf"^#+ {re.escape(heading)}\n", text, flags=re.MULTILINE)[1].partition("\n## ")[0]


@functools.cache
def names_of(path: Path) -> dict[str, list[ast.stmt]]:
    """The names that a module defines; it is read, not imported, so torch is not needed."""
    return names_in(ast.parse(path.read_text()).body)


def names_in(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """The names that a module or class defines, each with its own body."""
    found: dict[str, list[ast.stmt]] = {}
    for node in body:
        match node:
            case ast.ClassDef(name=name, body=inner):
                found[name] = inner
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found[name] = []
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                found[name] = []
    return found


def defined(path: Path, name: str) -> bool:
    """Whether the module defines `Name` or `Class.member`."""
    names = names_of(path)
    for part in name.split("."):
        if part not in names:
            return False
        names = names_in(names[part])
    return True


def types() -> dict[str, list[Path]]:
    """Every name with a capital that a module of the code defines, and where."""
    found: dict[str, list[Path]] = {}
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            for name in names_of(path):
                found.setdefault(name, []).append(path)
    return found


@pytest.mark.parametrize("text", [MAP, GUIDE], ids=["architecture", "contributing"])
def test_every_path_exists(text: str) -> None:
    """A file or folder that is named is there; one that moved is named anew."""
    paths = {span.partition(":")[0] for span in spans(text) if PATH.fullmatch(span.partition(":")[0])}
    assert paths
    assert not [path for path in sorted(paths) if not (ROOT / path).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("text", [MAP, GUIDE], ids=["architecture", "contributing"])
def test_every_name_exists(text: str) -> None:
    """`file.py:Name` is defined in that file, and a type that stands alone is defined in some module."""
    everywhere = types()
    lost = []
    for span in sorted(spans(text)):
        if named := NAMED.fullmatch(span):
            path = ROOT / named[1]
            if not (path.is_file() and defined(path, named[2])):
                lost.append(span)
        elif alone := TYPE.fullmatch(span):
            homes = everywhere.get(alone[1], [])
            if not any(defined(home, span) for home in homes):
                lost.append(span)
    assert not lost


@pytest.mark.parametrize("text", [MAP, GUIDE], ids=["architecture", "contributing"])
def test_every_setting_exists(text: str) -> None:
    """A TTS_* variable that is named can be set."""
    known = {variable_of(name) for name in load_settings({}).__struct_fields__}
    assert set(re.findall(r"`(TTS_\w+)`", text)) <= known


def test_the_map_has_every_folder() -> None:
    """Each package of the code has its line in the table of folders."""
    rows = set(re.findall(r"^\| `([\w/]+)/` \|", section("The folders"), re.MULTILINE))
    packages = {str(path.parent.relative_to(ROOT)) for folder in CODE for path in (ROOT / folder).rglob("__init__.py")}
    assert rows == packages | {"models", "server/deploy", "server/web", "tests"}


def test_the_map_has_every_wall() -> None:
    """Each contract of import-linter has its line, under the same name."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = {contract["name"] for contract in config["tool"]["importlinter"]["contracts"]}
    rows = set(re.findall(r"^\| ([^|`]+) \|", section("The walls"), re.MULTILINE))
    assert rows - {"Contract"} == contracts


@pytest.mark.parametrize(("text", "heading", "states"), STATES, ids=[heading for _, heading, _ in STATES])
def test_diagrams_have_every_state(text: str, heading: str, states: set[str]) -> None:
    """A diagram shows the states of the code, and no other."""
    diagrams = re.findall(r"^```mermaid\nstateDiagram-v2\n(.*?)^```", section(heading, text), re.MULTILINE | re.DOTALL)
    edges = re.findall(r"^ +(\S+) --> (\w+)", diagrams[0], re.MULTILINE)
    assert {state for edge in edges for state in edge} - {"[*]"} == states
