"""The promises that hold across modules: who imports whom, and what is never done."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: path for path in ROOT.glob("*.py")}


def imports_of(path):
    """The project's own modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & set(MODULES)


def test_imports_form_a_dag():
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    assert graph["train"], "the front door imports nothing: the check would hold for any graph"
    while graph:
        leaves = {name for name, needs in graph.items() if not needs}
        assert leaves, f"modules import each other in a circle: {sorted(graph)}"
        graph = {name: needs - leaves for name, needs in graph.items() if name not in leaves}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_each_file_says_what_it_owns(name):
    assert ast.get_docstring(ast.parse(MODULES[name].read_text())), f"{name}.py does not open with a sentence"


@pytest.mark.parametrize("path", sorted([*MODULES.values(), *ROOT.glob("tests/*.py")]), ids=lambda p: p.name)
def test_torch_load_reads_plain_data_only(path):
    """torch.load runs a pickle's code unless weights_only=True; there is no fallback anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True", f"{path.name}:{node.lineno}"
