"""The report in a real Chromium: no complaint, no stranger's script, no page wider than a phone."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from browser import CHROMIUM, Browser, read_png
from conftest import Library, Refresherr
from report_library import CONFIG, HOSTILE, make_hostile, make_library

import refresherr as program

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here; apt-get install chromium, and the report is looked at"
)
VISIBLE = 'Array.from(document.querySelectorAll("#links tbody tr")).filter(r => r.offsetHeight)'
PHONE, DESK = (360, 800), (1280, 900)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(autouse=True)
def at_a_desk(browser: Browser) -> None:
    browser.open("about:blank")
    browser.resize(*DESK)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a library of 1,200 links, 60 of them broken."""
    folder = tmp_path_factory.mktemp("library")
    refresherr = Refresherr(folder)
    make_library(refresherr.data_dir, 1200, 60, 300)
    config = folder / "refresherr.ini"
    config.write_text(CONFIG)
    config.chmod(0o600)
    assert refresherr("--config", config, "report").code == 0
    return refresherr.data_dir / "report.html"


def visible(browser: Browser) -> List[str]:
    texts: List[str] = browser.ask(f"{VISIBLE}.map(row => row.textContent)")
    return texts


# --- The search ------------------------------------------------------------------------------


def test_search_as_one_types(browser: Browser, page: Path) -> None:
    browser.open(page)
    every = visible(browser)
    assert len(every) == 61
    (word,) = re.findall(r"/media/tv/(.+?) \(", every[30])
    expected = [text for text in every if all(part in text for part in [*word.split(), "S0"])]
    assert 0 < len(expected) < 61
    browser.ask("document.querySelector('label').click()")  # the label leads to the box
    browser.type(word.upper())
    browser.type(" s0")
    assert visible(browser) == expected
    told = browser.ask("document.getElementById('told').textContent")
    assert told == f"{len(expected)} of 61"
    address = browser.ask("location.href")
    browser.type(" no such name")
    assert visible(browser) == []
    browser.open("about:blank")
    browser.open(address)  # as linked
    assert browser.ask("document.getElementById('q').value") == f"{word.upper()} s0"
    assert visible(browser) == expected
    browser.ask("location.hash = '#q='")
    browser.ask("new Promise(done => setTimeout(done, 50))")
    assert visible(browser) == every
    assert browser.complaints == []


@pytest.mark.parametrize(
    ("fragment", "words"),
    [("#q=%", "%"), ("#q=%E0%A4%A", "\ufffd"), ("#", ""), ("#other", ""),
     ("#q=Oule+%26%20Sons+S0&q=c", "Oule & Sons S0")],
)  # fmt: skip
def test_any_address(browser: Browser, page: Path, fragment: str, words: str) -> None:
    browser.open(page)
    every = visible(browser)
    browser.open("about:blank")
    browser.open(f"file://{page}{fragment}")
    found = [text for text in every if all(word in text for word in words.split())]
    assert visible(browser) == found
    assert (len(found) > 0) is (words in ("", "Oule & Sons S0"))
    assert browser.complaints == []


def test_without_javascript(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert len(visible(browser)) == 61
        assert "needs JavaScript" in browser.ask("document.body.innerText")
        assert browser.ask("document.getElementById('search').offsetHeight") == 0
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


# --- The looks -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_it_is_drawn_in_light_and_dark(browser: Browser, page: Path, size: Tuple[int, int]) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        browser.resize(*size, scheme)
        browser.open(page)
        assert browser.ask("document.documentElement.scrollWidth") == size[0]
        assert browser.complaints == []
        step, rows = read_png(browser.screenshot(), 200)
        assert len(rows[0]) == size[0] * step
        colours = {row[i : i + step] for row in rows for i in range(0, len(row), step)}
        assert len(colours) > 50
        backgrounds.append(sum(rows[0][:3]))
    assert backgrounds[0] > 600
    assert backgrounds[1] < 150


def test_it_is_printed_light_and_whole(browser: Browser, page: Path) -> None:
    browser.resize(718, 1000, "dark", "print")  # A4 between its margins
    browser.open(page)
    assert browser.ask("document.documentElement.scrollWidth") == 718
    assert len(visible(browser)) == 61
    assert browser.ask("document.getElementById('search').offsetHeight") == 0
    assert browser.ask("document.querySelector('#links thead').offsetHeight") > 0
    assert luminance(browser.ask("getComputedStyle(document.body).backgroundColor")) > 0.8


def luminance(colour: str) -> float:
    """Return the relative luminance of 'rgb(r, g, b)', as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(browser: Browser, page: Path, scheme: str) -> None:
    browser.resize(*DESK, scheme)
    browser.open(page)
    pairs: List[Tuple[str, str, str]] = browser.ask("""Array.from(
        document.querySelectorAll("h1, p, small, .state, td, th, input, label"), element => {
        let box = element;
        while (getComputedStyle(box).backgroundColor === "rgba(0, 0, 0, 0)") box = box.parentNode;
        const ink = getComputedStyle(element).color;
        return [element.className || element.tagName, ink, getComputedStyle(box).backgroundColor];
    })""")
    assert {"state ok", "state broken", "state unreachable", "state missing"} <= {
        p[0] for p in pairs
    }
    for name, ink, paper in set(map(tuple, pairs)):
        dark, light = sorted((luminance(ink), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) > 4.5, name


# --- Strangers -------------------------------------------------------------------------------


def test_hostile_names_are_text(browser: Browser, refresherr: Refresherr, library: Library) -> None:
    make_hostile(refresherr, library)
    assert refresherr("report").code == 0
    for size in (DESK, PHONE):
        browser.resize(*size)
        browser.open(refresherr.data_dir / "report.html")
        assert browser.ask("document.querySelectorAll('script').length") == 1
        assert browser.ask("document.querySelectorAll('img, iframe, title + title').length") == 0
        text = browser.ask("document.getElementById('links').textContent")
        for name in HOSTILE:
            assert text.count(program.escape(name.replace("|", "\u2215"))) == 3
        assert browser.ask("typeof window.pwned") == "undefined"
        assert browser.ask("document.documentElement.scrollWidth") == size[0]
        assert browser.complaints == []


@pytest.fixture
def elsewhere() -> Iterator[Tuple[str, List[str]]]:
    """A server, and what was asked of it."""
    asked: List[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_the_policy_stops_what_escaping_would_let_through(
    browser: Browser, page: Path, elsewhere: Tuple[str, List[str]], tmp_path: Path
) -> None:
    """Were an escape forgotten: no script runs, and nothing is fetched from elsewhere."""
    address, asked = elsewhere
    intruders = """(async () => {
        const wait = (tag, attributes) => new Promise(done => {
            const node = Object.assign(document.createElement(tag), attributes);
            node.onload = node.onerror = done;
            setTimeout(done, 1000);
            document.body.append(node);
        });
        await wait("img", {src: "ADDRESS/image"});
        await wait("link", {rel: "stylesheet", href: "ADDRESS/style"});
        await wait("script", {src: "ADDRESS/script"});
        await wait("iframe", {src: "ADDRESS/frame"});
        await fetch("ADDRESS/fetch", {mode: "no-cors"}).catch(() => 0);
        document.body.insertAdjacentHTML("beforeend", "<b id=x onclick='window.pwned = 1'>x</b>");
        document.getElementById("x").click();
        const inline = document.createElement("script");
        inline.textContent = "window.pwned = 1";
        document.body.append(inline);
        return typeof window.pwned;
    })()""".replace("ADDRESS", address)
    bare = tmp_path / "bare.html"
    bare.write_text("<!doctype html><title>no policy</title><body>")
    browser.open(bare)
    assert browser.ask(intruders) == "number"
    assert {"/image", "/style", "/script", "/frame", "/fetch"} <= set(asked)
    asked.clear()
    browser.open(page)
    assert browser.complaints == []
    assert browser.ask(intruders) == "undefined"
    assert asked == []
    assert browser.complaints  # so a violation does not go unnoticed


# --- Speed -----------------------------------------------------------------------------------


def test_five_thousand_rows(
    browser: Browser, refresherr: Refresherr, write_config: Callable[[str], Path],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_config(CONFIG)
    make_library(refresherr.data_dir, 6000, 5000, 1)
    assert refresherr("report").code == 0
    empty = tmp_path / "empty.html"
    empty.write_text("<!doctype html><title>empty</title>")
    took = []
    for file in (empty, refresherr.data_dir / "report.html") * 3:
        browser.open("about:blank")
        browser.open(file)
        entry = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
        took.append(browser.ask(entry))
    ratio = min(took[1::2]) / min(took[::2])
    with capsys.disabled():
        print(f" [5,000 rows: DOMContentLoaded {ratio:.1f} times that of an empty page] ", end="")
    assert len(visible(browser)) == 5000
    browser.ask("document.getElementById('q').focus()")
    browser.type("S01E03")
    told = browser.ask("document.getElementById('told').textContent")
    assert told == f"{len(visible(browser))} of 5000"
    assert 0 < len(visible(browser)) < 5000
    assert browser.complaints == []
