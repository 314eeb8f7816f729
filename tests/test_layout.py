"""The layout of the project: what stands at the top, and that imports run one way."""

import ast

import pytest

from tests.conftest import HERE

CONCEPTS = ("bert", "gates", "freelb", "data")  # used by the scripts and the folders
SCRIPTS = ("search", "draw", "finetune", "attack")
# each may import what stands after it
ORDER = ("experiments", "benchmarks", "scripts", "sharing", "attacks", "baselines", "inputs", "checkpoints", "runtime")


def imported(path):
    """The names of the project's modules and folders that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & {*CONCEPTS, *SCRIPTS, *ORDER}


def test_the_top_holds_the_scripts_and_concepts_of_the_paper():
    assert {path.stem for path in HERE.glob("*.py")} == {*CONCEPTS, *SCRIPTS, "test_all"}


@pytest.mark.parametrize("place", ORDER)
def test_imports_run_down_the_layout(place):
    paths = [HERE / f"{name}.py" for name in SCRIPTS] if place == "scripts" else sorted((HERE / place).glob("*.py"))
    allowed = {*CONCEPTS, *ORDER[ORDER.index(place) :]}
    if "scripts" in allowed and place != "scripts":
        allowed |= set(SCRIPTS)
    assert paths
    for path in paths:
        assert imported(path) <= allowed, path


def test_runtime_imports_no_concept():
    for path in (HERE / "runtime").glob("*.py"):
        assert imported(path) <= {"runtime"}, path
