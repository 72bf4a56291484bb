"""A release: one version in all files, what it depends on, and what `.ci/release` refuses."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import teon_optax

ROOT = pathlib.Path(__file__).parents[1]


def text(name):
    return (ROOT / name).read_text("utf-8")


def version():
    return tomllib.loads(text("pyproject.toml"))["project"]["version"]


def test_the_version_is_the_same_in_all_files():
    assert re.findall(r"^version: (\S+)$", text("CITATION.cff"), re.M) == [version()]
    assert re.findall(r"^ +version += \{(.+)\},$", text("README.md"), re.M) == [version()]
    newest = re.search(r"^## (\S+) - ", text("CHANGELOG.md"), re.M)
    assert newest and newest[1] == version()
    assert teon_optax.__version__ == version()


def test_the_citation_has_the_date_of_the_changelog():
    (date,) = re.findall(rf"^## {re.escape(version())} - (\S+)$", text("CHANGELOG.md"), re.M)
    expected = [] if date == "unreleased" else [date]
    assert re.findall(r"^date-released: (\S+)$", text("CITATION.cff"), re.M) == expected


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_the_library_needs_jax_and_optax_alone():
    declared = tomllib.loads(text("pyproject.toml"))["project"]["dependencies"]
    assert {re.split(r"\W", name)[0] for name in declared} == {"jax", "optax"}
    files = pathlib.Path(teon_optax.__file__).parent.rglob("*.py")
    imported = {name for path in files for name in imports_of(path)} - {*sys.stdlib_module_names}
    assert imported == {"teon_optax", "jax", "optax", "numpy"}  # NumPy comes with jax.


def release(folder, heading, tag):
    """Runs `.ci/release` on a tag of a version 1.2.3, without a Python to build with."""
    (folder / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "release", folder / ".ci")
    (folder / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n', "utf-8")
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n", "utf-8")
    tagged = os.environ | {"GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": tag, "PYTHON": "no-python"}
    return subprocess.run([script], env=tagged, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("heading", "tag", "message"),
    [
        ("1.2.2 - 2026-01-31", "v1.2.3", "CHANGELOG.md has no section for 1.2.3"),
        ("1.2.3 - 2026-01-31", "v1.2.4", "the tag v1.2.4 is not v1.2.3, the version in pyproject"),
        ("1.2.3 - unreleased", "v1.2.3", "says '## 1.2.3 - unreleased', which has no date"),
    ],
)
def test_a_tag_without_its_version_and_date_is_refused(heading, tag, message, tmp_path):
    done = release(tmp_path, heading, tag)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_tag_with_its_version_and_date_is_built(tmp_path):
    done = release(tmp_path, "1.2.3 - 2026-01-31", "v1.2.3")
    assert "CHANGELOG" not in done.stderr
    assert "no-python" in done.stderr
