# Licensed under the Apache License, Version 2.0
"""The shape of the package: imports flow one way, files that travel stand alone, files stay short."""

import ast
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "optimum_heapr"

MAP = ROOT / "docs/source/contributing.md"

# Of `modeling`, what stays at home: the files that make transformers know the rest.
STAYS_AT_HOME = ("__init__.py", "auto.py")

MAX_LINES = 300


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _identifier(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


class _Imports(ast.NodeVisitor):
    """All imports of a module, at any depth: (function they stand in, dotted name, names taken from it, level)."""

    def __init__(self):
        self.scope: list[str] = []
        self.found: list[tuple[str, str, list[str], int]] = []

    def _visit_scope(self, node):
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _visit_scope

    def visit_Import(self, node):
        self.found += [(".".join(self.scope), alias.name, [], 0) for alias in node.names]

    def visit_ImportFrom(self, node):
        self.found.append((".".join(self.scope), node.module or "", [alias.name for alias in node.names], node.level))


def _imports(path: Path) -> list[tuple[str, str, list[str], int]]:
    visitor = _Imports()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return visitor.found


def _imported_layers(path: Path, package: Path = PACKAGE) -> set[tuple[str, str]]:
    """(function, layer) of each import from this package; relative imports are resolved by their dots."""
    found = set()
    for scope, module, names, level in _imports(path):
        parts = module.split(".") if module else []
        if level:
            folder = path.relative_to(package).parent.parts
            parts = [*folder[: len(folder) - level + 1], *parts]
        elif parts[0] == package.name:
            parts = parts[1:]
        else:
            continue
        # `from . import x` and `from optimum_heapr import x` at the top of the package name the layers themselves.
        found |= {(scope, parts[0])} if parts else {(scope, name) for name in names}
    return found


def _rows() -> dict[str, list[str]]:
    """The newcomer's map of contributing.md: by layer, in order, the layers that it may import."""
    table = MAP.read_text(encoding="utf-8").partition("<!-- map -->\n")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {_layer(where.strip("`")): re.findall(r"`(\w+)`", imports) for where, _, _, imports in cells}


def _layer(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


ROWS = _rows()


def test_the_map_has_every_layer():
    parts = {_layer(_identifier(path)) for path in _sources()} - {"__init__"}
    assert set(ROWS) == parts


@pytest.mark.parametrize("layer", ROWS)
def test_imports_flow_one_way(layer):
    """No circle can be: what a layer may import stands above it, and it may import what it uses, no more."""
    above = list(ROWS)[: list(ROWS).index(layer)]
    assert set(ROWS[layer]) <= set(above), f"{layer} may import only what stands above it in {MAP.name}"
    used = {
        imported: f"{_identifier(path)} ({scope or 'module'})"
        for path in _sources()
        if _layer(_identifier(path)) == layer
        for scope, imported in _imported_layers(path)
    }
    unknown = {where: imported for imported, where in used.items() if imported not in {layer, "utils", *ROWS[layer]}}
    assert not unknown
    assert set(ROWS[layer]) <= set(used), f"{layer}: {MAP.name} names more than it imports"


def test_modeling_imports_no_other_layer():
    for path in sorted((PACKAGE / "modeling").glob("*.py")):
        assert {layer for _, layer in _imported_layers(path)} <= {"modeling"}, path.name


def test_travelling_files_stand_alone():
    """Checkpoints take these files along: torch, transformers, the standard library and one another, no more."""
    files = {path.name for path in (PACKAGE / "modeling").glob("*.py")} - set(STAYS_AT_HOME)
    assert {"atomic_experts.py", "configuration_heapr.py", "conversion.py", "modeling_heapr.py"} <= files
    for name in sorted(files):
        for scope, module, names, level in _imports(PACKAGE / "modeling" / name):
            if level == 0:
                top = module.split(".")[0]
                assert top in {"torch", "transformers"} or top in sys.stdlib_module_names, f"{name} imports {module}"
            else:
                # `from .module import name`: the only form that transformers follows into the checkpoint.
                assert level == 1 and module and "." not in module, f"{name}: {'.' * level}{module} is not flat"
                assert f"{module}.py" in files, f"{name} imports {module}, which does not travel"
                assert not scope, f"{name}: transformers copies what module-level imports name, {scope} has one"


def test_nothing_travels_in_folders():
    assert not [path for path in (PACKAGE / "modeling").rglob("*.py") if path.parent.name != "modeling"]


@pytest.mark.parametrize("path", _sources(), ids=_identifier)
def test_files_are_short_and_licensed(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES
    assert lines[0] == "# Licensed under the Apache License, Version 2.0"


def test_registration_folder_is_a_namespace():
    """Optimum's plugins share `optimum.commands.register`; a package file there would hide the others."""
    assert not list((ROOT / "optimum").rglob("__init__.py"))
    assert _imports(ROOT / "optimum/commands/register/register_heapr.py") == [
        ("", "optimum_heapr.cli", ["HeaprCommand"], 0)
    ]


def test_the_checks_see_a_wrong_import(tmp_path):
    """Guards the tests above: relative, absolute and function-level imports against the flow are all seen."""
    source = tmp_path / "utils" / "wrong.py"
    source.parent.mkdir()
    source.write_text(
        "from ..pruner import load_model\nfrom .. import planning\n"
        "def later():\n    import optimum_heapr.cli.base\n    from optimum_heapr.surgery import apply\n"
    )
    found = _imported_layers(source, tmp_path)
    assert {layer for _, layer in found} == {"pruner", "planning"}
    (tmp_path / "optimum_heapr" / "utils").mkdir(parents=True)
    source = source.rename(tmp_path / "optimum_heapr" / "utils" / "wrong.py")
    found = _imported_layers(source, tmp_path / "optimum_heapr")
    assert found == {("", "pruner"), ("", "planning"), ("later", "cli"), ("later", "surgery")}
