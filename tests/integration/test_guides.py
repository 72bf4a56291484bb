"""The examples on the pages of `docs/` that tell users what to write."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["alignment", "migrating", "troubleshooting"])
def test_the_examples_on_a_page_show_what_they_give(page):
    results = doctest.testfile(
        str(DOCS / f"{page}.md"), module_relative=False, optionflags=doctest.ELLIPSIS
    )
    assert results.attempted and not results.failed
