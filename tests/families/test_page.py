"""docs/families.md: its first table has every test, its tests exist, and its links find plans."""

import ast
import pathlib
import re

import pytest
from checks import PAGE, PLANS

FOLDER = pathlib.Path(__file__).parent
ROWS = re.findall(
    r"^\| \[.*?\]\(families/(\w+\.md)#(.*?)\) \|.*\| `tests/families/(.*?)` \|$",
    PAGE.read_text("utf-8"),
    re.M,
)


def cases_of(file):
    """Every test of a file, with the source of what it is parametrized by."""
    functions = ast.parse((FOLDER / file).read_text("utf-8")).body
    return {
        node.name: " ".join(map(ast.unparse, node.decorator_list))
        for node in functions
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("page, anchor, test", ROWS)
def test_a_family_has_a_test_and_a_plan(page, anchor, test):
    found = re.fullmatch(r"(\w+\.py)::(\w+)(?:\[(\w+)\])?", test)
    assert found is not None
    file, name, case = found.groups()
    assert name in cases_of(file)
    assert (case or "") in cases_of(file)[name]
    assert f"<!-- plan: {anchor} -->" in (PLANS / page).read_text("utf-8")


def test_every_test_of_a_family_is_in_the_table():
    files = {path.name for path in FOLDER.glob("test_*.py")} - {
        pathlib.Path(__file__).name,
        "test_recorded.py",  # writes its part of the page itself
    }
    written = {(file, name) for file in files for name in cases_of(file)}
    tests = "\n".join(test for *_, test in ROWS)
    assert written == set(re.findall(r"^(.*)::(\w+)", tests, re.M))
