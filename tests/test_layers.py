"""The shape of the house: imports that point down, short functions, importing without effect."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ROWS = [
    ["utils"],
    ["geometry", "memory"],
    ["frames"],
    ["tiff", "omezarr", "pictures"],
    [
        "config",
        "model",
        "dataset",
        "metrics",
        "compiled",
        "report",
        "phantom",
        "images",
        "optim",
        "parallel",
        "tiling",
        "objects",
        "writers",
    ],
    ["checkpoint"],
    ["isbi", "augment", "labels", "losses", "predictor"],
    ["loader", "evaluate", "pairing"],
    ["train", "predict", "export", "database", "display_result"],
    ["main", "run_make_database"],
]
ROW = {module: number for number, row in enumerate(ROWS) for module in row}
FILES = sorted(ROOT.glob("*.py"))


def test_every_module_has_its_row():
    assert {file.stem for file in FILES} == set(ROW)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imports_point_down(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in set(names) & set(ROW):
            assert ROW[name] < ROW[file.stem], f"{file.stem} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_function_is_longer_than_a_page(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node)
            length = node.end_lineno - node.lineno + 1 - (len(doc.splitlines()) + 1 if doc else 0)
            assert length <= 35, f"{node.name} has {length} lines"


def test_importing_has_no_effect():
    code = (
        f"import sys; sys.argv = ['x', '--no_such_flag']; import {', '.join(ROW)}; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
