"""mkdocs: the site holds what its pages link to in the repository.

A page links to a file outside docs/ as on any forge, `../bench/results/cpu/bench.md` or `../kernels/rows.py`. Such
files join the site at the same place below its root, and the links follow.
"""

import pathlib
import re

from mkdocs.structure.files import File

_LINK = re.compile(r"\]\((?P<up>(?:\.\./)+)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # at the top, and in the navigation
_ROOT = pathlib.Path(__file__).parents[1]


def _outside(path: str) -> bool:
    return (_ROOT / path).is_file() and not path.startswith("docs/")


def on_files(files, config):
    linked = set(_PAGES)
    for page in files.documentation_pages():
        linked.update(match["path"] for match in _LINK.finditer(page.content_string))
    for name in _PAGES:
        text = (_ROOT / name).read_text(encoding="utf-8")
        linked.update(path for path in re.findall(r"\]\(([^)#\s:]+)\)", text) if _outside(path))
    for path in sorted(filter(_outside, linked)):
        if path.endswith(".md") and path not in _PAGES:  # a table of results or a README: shown as it is
            content = (_ROOT / path).read_text(encoding="utf-8")
            files.append(File.generated(config, f"{path}.txt", content=content))
        else:
            files.append(File.generated(config, path, abs_src_path=str(_ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    here = pathlib.PurePosixPath(page.file.src_uri).parent
    depth = len(here.parts)

    def moved(path: str) -> str:
        return path if not path.endswith(".md") or path in _PAGES else f"{path}.txt"

    def link(match):
        if match["up"].count("../") != depth + 1 or not _outside(match["path"]):
            return match[0]
        return f"]({'../' * depth}{moved(match['path'])}{match['anchor'] or ''})"

    if page.file.src_uri in _PAGES:
        markdown = re.sub(r"\]\(docs/", "](", markdown)
        return re.sub(r"\]\(([^)#\s:]+)\)", lambda m: f"]({moved(m[1])})" if _outside(m[1]) else m[0], markdown)
    return _LINK.sub(link, markdown)
