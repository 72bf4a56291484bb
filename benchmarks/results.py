"""What every benchmark writes: a JSON file that says where it was measured, a table, a plot."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "torch")


def environment(folder: str = ".") -> dict[str, Any]:
    """Finds the last commit that changed a folder, and this process' machine and versions."""
    commit = _git("log", "-1", "--format=%H", "--", folder)
    changed = _git("status", "--porcelain", "--", "teon_optax", "benchmarks/*.py")
    return {
        "commit": commit and commit[:12] + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        # Above the number of cores, others were at work, and times are upper bounds.
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def caption(record: dict[str, Any]) -> str:
    """Says in a line under a table where and with what it was measured."""
    where = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['date'][:10]}, commit {where['commit']}; {where['device']} ({where['machine']}, "
        f"load {where['load']}); Python {where['python']}, {versions}."
    )


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Begins the command line of a benchmark: where it writes."""
    parser = argparse.ArgumentParser(
        f"benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=FOLDER, help="default: benchmarks/results")
    add("--update-readme", action="store_true", help="put the table into the page that shows it")
    return parser


def separated(kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """Makes a reader of values between commas, for `add_argument(type=...)`."""
    return lambda text: [kind(item) for item in text.split(",")]


def publish(
    options: argparse.Namespace,
    name: str,
    record: dict[str, Any],
    page: str,
    figure: Any,
    readme: Path | None = None,
) -> None:
    """Writes what a benchmark has found where its command line says.

    Args:
        options: Of a parser that `parser` has begun.
        name: Of the files, and of the place in the page.
        record: For the JSON file.
        page: The table, for the Markdown file and the page that shows it.
        figure: The plot.
        readme: That page; benchmarks/README.md by default.
    """
    write(options.out, name, record, page, figure)
    if options.update_readme:
        update_readme(name, page, readme or README)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes a table, whose first column is text and the others figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def write(out: Path, name: str, record: dict[str, Any], page: str, figure: Any = None) -> None:
    """Writes `name`.json, .md and, of a figure, .png into the folder `out`, and prints the page."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"{name}.md").write_text(page + "\n")
    if figure is not None:
        figure.savefig(out / f"{name}.png", dpi=110)
    print(page)
    written = ".json, .md" + (", .png" if figure is not None else "")
    print(f"\nwritten: {out / name}{written}", file=sys.stderr)


def update_readme(name: str, page: str, readme: Path = README) -> None:
    """Puts a page where the README has `<!-- name -->` ... `<!-- end -->`.

    Raises:
      ValueError: If it has no such place.
    """
    text = readme.read_text()
    start, end = f"<!-- {name} -->", "<!-- end -->"
    place = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not place.search(text):
        raise ValueError(f"{readme} has no place for these results: add {start} and {end}")
    readme.write_text(place.sub(lambda _: f"{start}\n\n{page}\n\n{end}", text, count=1))


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=FOLDER.parent.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
