"""Checks that docs/in_your_trainer.md shows the plans that a trainer printed.

examples/trainers/run nnx | tee output.txt
python examples/trainers/page.py nnx output.txt          # fails where the page has another plan
python examples/trainers/page.py nnx output.txt --write  # puts the plans onto the page
"""

import argparse
import pathlib
import re

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "in_your_trainer.md"
PLAN = re.compile(r"^orthogonalized .*?^matrix products per step: [^\n]*\n", re.M | re.S)


def with_plans(page: str, name: str, output: str) -> str:
    """The page, with plan number N of the output after each `<!-- plan N: name -->`."""
    plans = PLAN.findall(output)
    block = re.compile(rf"(<!-- plan (\d+): {name} -->\n\n```text\n).*?(?=^```$)", re.M | re.S)
    return block.sub(lambda match: match[1] + plans[int(match[2]) - 1], page)


def main() -> None:
    """Compares, or writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    page = PAGE.read_text("utf-8")
    expected = with_plans(page, options.name, options.output.read_text("utf-8"))
    if options.write:
        PAGE.write_text(expected, "utf-8")
    elif page != expected:
        raise SystemExit(f"{PAGE.name} shows another plan of {options.name}; --write mends it.")


if __name__ == "__main__":
    main()
