"""The site builds without a warning, links to nothing that is not there, and opens in a browser without an error."""

import contextlib
import functools
import http.server
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest
from browser import browser, needs_chromium

REPOSITORY = pathlib.Path(__file__).parents[1]
EMBEDDED = "images/kept.html"  # in a frame of a page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=REPOSITORY, env=dict(os.environ, NO_MKDOCS_2_WARNING="1"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_every_link_and_image_leads_somewhere(site):
    missing = []
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|//|/", target) and not (page.parent / target).exists():
                missing.append((page.name, target))
    assert not missing


def test_every_page_is_in_the_navigation(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    pages = {page.relative_to(site).as_posix() for page in site.rglob("*.html")} - {"404.html", "index.html", EMBEDDED}
    assert len(pages) > 10
    assert [page for page in sorted(pages) if f'href="{page}"' not in start] == []


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def served(folder):
    handler = functools.partial(_Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@needs_chromium
def test_a_browser_follows_the_navigation_without_an_error(site, tmp_path):
    """Every page that the start page's navigation leads to: a headline, the page marked, images there, nothing fetched
    from elsewhere, nothing said on the console."""
    with served(site) as address, browser(tmp_path) as chromium:
        chromium.open(f"{address}/index.html")
        links = chromium.ask('[...new Set([...document.querySelectorAll("nav a.md-nav__link")].map(a => a.href))]')
        pages = [link for link in links if "#" not in link]
        assert len(pages) > 20
        for page in pages:
            chromium.open(page)
            assert chromium.ask('document.querySelectorAll("h1").length') == 1, page
            assert chromium.ask('document.querySelectorAll(".md-nav__link--active").length') >= 1, page
            assert chromium.ask("[...document.images].filter(i => i.complete && !i.naturalWidth).length") == 0, page
            assert not chromium.errors, page
            assert all(request.startswith((address, "data:")) for request in chromium.requests), page
