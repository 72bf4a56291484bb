"""What MkDocs needs to build the site from files all over the repository, none of them copied.

README.md is the home page. Other pages and images outside docs/ keep their place:
`benchmarks/README.md` is a page of that name. Links are written as they work in the repository, and
turned into those of the site here.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Pages of the site, by the files of the repository that they are.
OUTSIDE = {
    "index.md": "README.md",
    **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")},
}
IMAGES = "benchmarks/results/**/*.png"

# [text](path#fragment), for paths that are relative.
_LINK = re.compile(r"\[((?:[^][]|\[[^][]*\])*)\]\((?![a-z]+:|[/#])([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """Leaves pages out of the navigation that are not written yet."""
    config.nav = _existing(config.nav)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages and images outside docs/."""
    images = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(IMAGES))]
    for page, name in (OUTSIDE | dict(zip(images, images, strict=True))).items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links of the repository into links of the site."""
    source = page.file.src_uri
    return _links(markdown, OUTSIDE.get(source, f"docs/{source}"), page, config, files)


def _existing(nav: Any) -> Any:
    if isinstance(nav, list):
        return [item for item in map(_existing, nav) if item]
    if isinstance(nav, dict):
        ((title, target),) = nav.items()
        return {title: found} if (found := _existing(target)) else None
    places = (ROOT / OUTSIDE.get(nav, nav), ROOT / "docs" / nav)
    return nav if any(place.exists() for place in places) else None


def _links(text: str, place: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Text of the file `place` of the repository, for a page of the site."""

    def link(match: re.Match[str]) -> str:
        words, path, fragment = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        name = "index.md" if path == "README.md" else path.removeprefix("docs/")
        if files.get_file_from_path(name):
            there = posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")
            return f"[{words}]({there}{fragment})"
        is_image = match.string[: match.start()].endswith("!")
        if match[2].startswith("../") and (is_image or not (ROOT / path).exists()):
            # MkDocs does not follow links out of its folder.
            raise PluginError(f"{place}: {match[2]!r} is not there, or no image of the site.")
        if is_image or not (ROOT / path).exists():
            return match[0]  # for MkDocs to complain about
        if config.repo_url:
            return f"[{words}]({config.repo_url.rstrip('/')}/blob/main/{path}{fragment})"
        return words

    return _LINK.sub(link, text)
