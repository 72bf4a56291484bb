"""Unpacks a Debian package into a folder of texts for `reproduce --data` and `train_gpt --data`.

    python -m benchmarks.corpus                                        # kernel documentation, 37 MB
    python -m benchmarks.corpus linux-source --suffixes .c .h          # kernel source
    python -m benchmarks.corpus linux-doc-6.1_6.1.192-2_all.deb        # a file that is at hand

Needs apt and dpkg, but no root; nothing is installed. Compressed files and tar archives in the
package are unpacked; of files with the same content one is kept, so that training and held-out
files do not share a text.
"""

import argparse
import gzip
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "runs/corpora"
SUFFIXES = (".rst", ".txt", ".md", ".tex", ".yaml")
PACKAGED = frozenset({"changelog", "copyright", "NEWS", "html"})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser("benchmarks.corpus", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("package", nargs="?", default="linux-doc", help="name or .deb file; default: linux-doc")
    add("--suffixes", nargs="+", default=SUFFIXES, metavar="S", help=f"default: {SUFFIXES}")
    add("--out", type=Path, help="default: runs/corpora/PACKAGE")
    options = parser.parse_args(argv)
    out = options.out or FOLDER / Path(options.package).stem
    if out.exists():
        print(f"corpus: {out} exists already", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        try:
            content = unpack(package_file(options.package, Path(scratch)), Path(scratch))
        except subprocess.CalledProcessError as error:
            print(f"corpus: `{' '.join(map(str, error.cmd))}` has failed", file=sys.stderr)
            return 2
        count, size = keep(content, tuple(options.suffixes), out)
    print(f"{out}: {count} files, {size / 1e6:.1f} MB")
    return 0 if count else 2


def package_file(package: str, scratch: Path) -> Path:
    """Finds the .deb file, or downloads it; for a meta-package that of what it depends on."""
    if package.endswith(".deb"):
        return Path(package).resolve()
    _call("apt-get", "download", package, cwd=scratch)
    (found,) = scratch.glob(f"{package}_*.deb")
    depends = _call("dpkg-deb", "--field", found, "Depends")
    versioned = re.search(rf"{re.escape(package)}-[\d.]+", depends)
    return package_file(versioned[0], scratch) if versioned else found


def unpack(package: Path, scratch: Path) -> Path:
    """Unpacks the files of a package, and archives among them."""
    content = scratch / "content"
    _call("dpkg-deb", "--extract", package, content)
    for path in list(content.rglob("*.tar.*")):
        with tarfile.open(path) as archive:
            archive.extractall(content / "archive", filter="data")
    return content


def keep(content: Path, suffixes: tuple[str, ...], out: Path) -> tuple[int, int]:
    """Writes texts with one of the suffixes, each once; their number and bytes."""
    seen, size = set(), 0
    for name, text in texts(content, suffixes):
        digest = hashlib.sha256(text).digest()
        if text and digest not in seen:
            seen.add(digest)
            size += len(text)
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(text)
    return len(seen), size


def texts(content: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(content.rglob("*")):
        name = path.relative_to(content)
        packed = name.suffix == ".gz"
        name = name.with_suffix("") if packed else name
        ours = PACKAGED.isdisjoint([*name.parts, name.stem])
        if ours and name.suffix in suffixes and path.is_file() and not path.is_symlink():
            yield name, gzip.decompress(path.read_bytes()) if packed else path.read_bytes()


def _call(*command: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
