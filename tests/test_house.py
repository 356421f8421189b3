"""The shape of the house: imports that point down, short functions, importing without effect."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ROWS = [  # of files at the door and of folders; what stands in a row imports what stands above it
    ["signals", "model", "rules"],
    ["utils"],
    ["device", "progress"],
    ["files"],
    ["locks"],
    ["exchange"],
    ["flags", "distributed", "images", "legacy"],
    ["config"],
    ["samples", "arguments"],
    ["description"],
    ["dataset"],
    ["checkpoint"],
    ["training", "prediction"],
    ["sources", "evaluation"],
    ["train", "predict", "run_make_database", "display_result"],
    ["main"],
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row}
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
FILES = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))])
IDS = [str(file.relative_to(ROOT)) for file in FILES]


def home(file):
    """Name under which a file stands in `ROWS`."""
    return file.stem if file.parent == ROOT else file.parent.name


def test_rows_hold_every_module():
    assert {home(file) for file in FILES} == set(ROW)


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_imports_point_down(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in {name.partition(".")[0] for name in names} & set(ROW) - {home(file)}:
            assert ROW[name] < ROW[home(file)], f"{home(file)} imports {name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_says_in_one_sentence_what_it_holds(folder):
    text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert text.endswith(".") and "\n" not in text


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_files_have_at_most_420_lines(file):
    assert len(file.read_text().splitlines()) <= 420


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_functions_are_no_longer_than_a_page(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node)
            length = node.end_lineno - node.lineno + 1 - (len(doc.splitlines()) + 1 if doc else 0)
            is_loop = (file.name, node.name) == ("train.py", "_train")  # of the training, read from top to bottom
            assert length <= (60 if is_loop else 30), f"{node.name} has {length} lines"


def test_importing_has_no_effect():
    modules = [name.removesuffix(".py").replace("/", ".") for name in IDS]
    code = "import sys; sys.argv = ['x', '--no_such_flag']; import sources.database; print('torch' in sys.modules)"
    code += f"; import {', '.join(modules)}"
    code += "; print({'matplotlib', 'bioio', 'dask', 'h5py', 'zarr'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\nset()\n", "")
