# Licensed under the Apache License, Version 2.0
"""The shape of the package: imports flow one way, files that travel stand alone, files stay short."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "optimum_heapr"

# Each layer imports itself and the layers before it. `modeling` may come early because it imports none of the others.
LAYERS = (
    "utils",
    "demo",
    "modeling",
    "configuration",
    "experts",
    "checkpoint",
    "families",
    "calibration",
    "criteria",
    "planning",
    "surgery",
    "evaluation",
    "report",
    "hub",
    "loading",
    "saving",
    "streamed",
    "recovery",
    "pruner",
    "cli",
)

# Importing file, function, imported layer: against the flow, each with its reason in the code.
EXCEPTIONS = {("calibration/statistics.py", "AtomicStatistics.importance", "criteria")}

# Of `modeling`, what stays at home: the files that make transformers know the rest.
STAYS_AT_HOME = ("__init__.py", "auto.py")

MAX_LINES = 400


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


@pytest.mark.parametrize("path", _sources(), ids=_identifier)
def test_imports_flow_one_way(path):
    name = _identifier(path)
    if name == "__init__.py":  # the public names, resolved when they are asked for
        return
    own = name.split("/")[0].removesuffix(".py")
    assert own in LAYERS, f"{name}: a new layer needs its place in LAYERS"
    allowed = LAYERS[: LAYERS.index(own) + 1]
    for scope, layer in _imported_layers(path):
        assert layer in allowed or (name, scope, layer) in EXCEPTIONS, f"{name} ({scope or 'module'}) imports {layer}"


def test_exceptions_are_still_needed():
    used = {(_identifier(path), scope, layer) for path in _sources() for scope, layer in _imported_layers(path)}
    assert used >= EXCEPTIONS


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
    assert len(lines) < MAX_LINES
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
