"""Every example of every page runs, and prints what the page shows.

A page's fenced blocks of Python are one program, in their order. A block of `text` right after one
is what it printed; WRITE_OUTPUT=1 writes it there. A block with `>>>` is a doctest. A comment
`<!-- hidden: ... -->` holds code that readers need not see.
"""

import ast
import contextlib
import doctest
import io
import os
import pathlib
import re
import sys
import tomllib
from itertools import zip_longest

import pytest

import teon_optax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
BLOCK = re.compile(r"^<!-- hidden:\n(.*?)^-->$|^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
# Lines of a model beside its plan: tests/families builds the models and compares the plans; and
# lines of examples/trainers beside theirs: tests/test_trainers.py compares the lines.
FRAGMENTS = [ROOT / "docs" / "families.md", ROOT / "docs" / "in_your_trainer.md"]
PYTHON = ("python", "pycon")


def blocks(page):
    """(line, language, text) of each block of a page, with what is shown right after it or None."""
    text = page.read_text("utf-8")
    found = list(BLOCK.finditer(text))
    for block, after in zip_longest(found, found[1:]):
        hidden, language, code = block.groups()
        shown = None
        if after and after[2] == "text" and not text[block.end() : after.start()].strip():
            shown = after[3]
        line = text[: block.start()].count("\n") + 1
        yield line, "python" if hidden else language, hidden or code, shown


def programs():
    for page in PAGES:
        if page not in FRAGMENTS and any(language in PYTHON for _, language, _, _ in blocks(page)):
            yield pytest.param(page, id=page.relative_to(ROOT).as_posix())


def imported(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def source(code):
    """A block without the prompts and the output of a doctest."""
    examples = doctest.DocTestParser().get_examples(code)
    return "".join(example.source for example in examples) if examples else code


def run_doctest(code, names, page, line):
    test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
    test.globs = names  # not the copy that it made: the next block goes on
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test, out=report.write, clear_globs=False)
    assert not runner.failures, report.getvalue()


@pytest.mark.promotes_dtypes
@pytest.mark.promotes_ranks
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("page", list(programs()))
def test_a_page_prints_what_it_shows(page, tmp_path, monkeypatch):
    program = [block for block in blocks(page) if block[1] in PYTHON]
    for _, _, code, _ in program:
        for library in set(imported(source(code))) - set(sys.stdlib_module_names):
            pytest.importorskip(library)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, _, code, shown in program:
        if code.lstrip().startswith(">>>"):
            run_doctest(code, names, page, line)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, page, "exec"), names)
        if os.environ.get("WRITE_OUTPUT") and shown is not None:
            text = page.read_text("utf-8")
            after = "```\n\n```text\n"
            text = text.replace(code + after + shown, code + after + printed.getvalue())
            page.write_text(text, "utf-8")
        else:
            assert printed.getvalue() == (shown or ""), f"{page}:{line}"


def test_the_first_use_is_within_forty_lines_of_the_readme():
    start = (ROOT / "README.md").read_text("utf-8").splitlines()[:40]
    assert any("teon(" in line for line in start) and any("plan(" in line for line in start)


def test_the_repository_has_one_address():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    pages = [ROOT / "CITATION.cff", *PAGES]
    found = re.findall(
        r"https://github\.com/[\w-]+/teon_optax", "\n".join(p.read_text("utf-8") for p in pages)
    )
    assert {*found} == {urls["Repository"]}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    documented = set(re.findall(r"^::: teon_optax\.([\w.]+)$", page, re.M))
    of_contrib = {f"contrib.{name}" for name in teon_optax.contrib.__all__}
    assert documented == {*teon_optax.__all__, *of_contrib} - {"contrib"}


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in nav] == []
