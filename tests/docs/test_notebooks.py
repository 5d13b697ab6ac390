# Licensed under the Apache License, Version 2.0
"""Notebooks run as they stand: their cells one after another in one namespace, in a folder of their own."""

import ast
import json
import re
import time

import pytest

from tests.docs.pages import PAGES, ROOT


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
QUICKSTART = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


def cells(notebook, kind):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def run_cells(notebook) -> dict:
    """What the cells leave behind, and under `shown` the values that notebooks show: of a last expression."""
    namespace = {"__name__": "__main__", "shown": []}
    for number, code in enumerate(cells(notebook, "code")):
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{notebook.name}, cell {number}", "exec"), namespace)
        if last is not None:
            namespace["shown"].append(eval(compile(ast.Expression(last.value), notebook.name, "eval"), namespace))
    return namespace


def test_the_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    found = run_cells(QUICKSTART)
    assert time.process_time() - began < 120, "two minutes were promised"
    chosen, report = found["chosen"], found["pruner"].report
    assert chosen.measured + chosen.error <= found["allowed"] and chosen in found["points"]
    assert found["shown"][0] is found["statistics"] and "chosen: obs" in found["shown"][1]._repr_svg_()
    assert found["pruner"].applied_plan.ratio == pytest.approx(chosen.ratio, abs=1e-3)
    assert found["pruner"].applied_plan.config.compensates_blocks and report["loss"]["measured"]["held_out"]
    assert found["model"].num_parameters() == chosen.parameters < found["unpruned"].num_parameters()
    written = re.findall(r"(before|after) +'", capsys.readouterr().out)
    assert written == ["before", "after"] * 3 and (tmp_path / "pruned" / "heapr" / "report.html").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_valid_and_hold_no_output(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in content["cells"]:
        expected = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            expected |= {"execution_count", "outputs"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        assert set(cell) == expected and isinstance(cell["source"], list)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_linked_and_their_links_lead_somewhere(notebook):
    assert any(f"notebooks/{notebook.name})" in page.read_text(encoding="utf-8") for page in PAGES)
    for target in re.findall(r"\]\(([^)#\s]+)\)", "\n".join(cells(notebook, "markdown"))):
        assert (notebook.parent / target).exists(), target
