"""The report: what it shows, that nothing foreign is more than text in it, and its size."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import time
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
import report_library
from conftest import Library, Refresherr
from report_library import CONFIG, DAY, FILMS, HOSTILE, SECRET, TV, make_hostile, make_library

import refresherr as program

VOID = {"meta", "link", "input", "rect", "path"}


class Page(HTMLParser):
    """A page as a strict reader sees it: every tag is closed where it should be."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.open: List[str] = []
        self.tags: List[Tuple[str, Dict[str, str]]] = []
        self.text = ""
        self.rows: List[List[str]] = []  # of the table of links
        self._in_links = False
        self.feed(self.source)
        self.close()
        assert self.open == ["html", "body"]

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), attrs
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._in_links = ("id", "links") in attrs
        if self._in_links and tag == "tr":
            self.rows.append([])
        if self._in_links and tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data
        if self._in_links and "td" in self.open:
            self.rows[-1][-1] += data

    @property
    def links(self) -> Dict[str, List[str]]:
        """The rows of the table of links by their second cell."""
        return {row[1]: row for row in self.rows if row}


def report(refresherr: Refresherr, *words: object) -> Page:
    result = refresherr("report", *words)
    assert (result.code, result.err) == (0, "")
    return Page(refresherr.data_dir / "report.html")


@pytest.fixture
def made_up(refresherr: Refresherr, write_config: Callable[[str], Path]) -> Refresherr:
    """A library of 1,200 links, 60 of them broken."""
    write_config(CONFIG)
    make_library(refresherr.data_dir, 1200, 60, 30)
    return refresherr


def dump(refresherr: Refresherr) -> List[str]:
    with closing(sqlite3.connect(str(refresherr.db_path))) as conn:
        return list(conn.iterdump())


# --- What it shows ---------------------------------------------------------------------------


def test_it_shows_what_the_commands_say(made_up: Refresherr) -> None:
    before = dump(made_up)
    page = report(made_up)
    assert dump(made_up) == before
    broken = made_up("broken", "--json").json["links"]
    counts = made_up("stats", "--json").json
    assert "60 broken of 1,200 links" in page.text
    for status, number in (("ok", "1,138"), ("broken", "60"), ("missing", "2")):
        assert f"{status}{number}" in page.text
    lost, replaced = made_up("broken", "--status", "missing", "--json").json["links"]
    assert replaced["path"] not in str(page.links)  # it is well
    assert set(page.links) == {link["path"] + link["target"] for link in broken}
    assert [link["path"] for link in broken if link["status"] != "broken"] == [lost["path"]]
    for link in (link for link in broken if link["status"] == "broken"):
        state, _, since, owner, step = page.links[link["path"] + link["target"]]
        assert (state, owner, step) == ("broken", link["instance"], link["next"])
        assert since == link["since"][:16].replace("T", " ") + " UTC"
    state, _, _, _, step = page.links[lost["path"] + lost["target"]]
    assert (state, step[:15]) == ("missing", "needs attention")
    assert "Last scan " in page.text
    for root in (TV, FILMS):
        ok, bad = (
            made_up.query(
                "SELECT count(*) FROM symlinks WHERE path LIKE ? AND status = ?", f"{root}/%", s
            )[0][0]
            for s in ("ok", "broken")
        )
        assert re.search(rf"{root}{ok:,} ok, {bad:,} broken, 0 unreachable, \d missing", page.text)
    for server, numbers in counts["repairs"]["instances"].items():
        names = ("sent", "repaired", "waiting", "needs_attention")
        assert server + "".join(str(numbers[name]) for name in names) in page.text
    for status, number in counts["actions"].items():
        assert f"{number} {status}" in page.text
    assert "no release was found in 3 searches" in page.text
    assert f"Refresherr {program.__version__} from {made_up.db_path}" in page.text


def test_the_worst_shows(made_up: Refresherr) -> None:
    rows = made_up.query("SELECT path FROM symlinks WHERE status = 'broken'")
    names = [program.parse_media(path).name for (path,) in rows]
    worst = max(set(names), key=names.count)
    page = report(made_up)
    table = page.text[page.text.index("TitleBroken") :]
    assert table.split("\n")[1] == f"{worst}{names.count(worst)}"


def test_nothing_to_show(refresherr: Refresherr) -> None:
    refresherr.make_database()
    page = report(refresherr)
    for text in (
        "Nothing has been scanned yet",
        "None broken of 0 links",
        "There has been no scan",
    ):
        assert text in page.text
    assert page.rows == []
    assert "nan" not in page.source.lower()


def test_one_scan(refresherr: Refresherr, library: Library) -> None:
    """Without configured roots those of the scan count; good links are not listed."""
    library.season("Show", 3)
    library.link("Show/Season 01/Show - S01E09.mkv", "gone.mkv", exists=False)
    refresherr.scan(library.root)
    page = report(refresherr)
    assert f"{library.root}3 ok, 1 broken" in page.text
    assert "Now 1 broken; at most 1" in page.text
    assert "In the last 60 days 1 broke" in page.text
    assert [row[0] for row in page.links.values()] == ["broken"]
    assert len(re.findall(r'<path class="area" d="M0 0(H0V0)+H1V1H0Z"/>', page.source)) == 1


def test_an_outage(refresherr: Refresherr, library: Library) -> None:
    """It says why, lists what cannot be reached, and does not speak of health."""
    library.season("Show", 20)
    assert refresherr.scan(library.root)["totals"]["ok"] == 20
    library.mount.rename(library.mount.parent / "elsewhere")
    library.mount.mkdir()
    said = refresherr.scan(library.root)["message"]
    page = report(refresherr)
    assert "20 unreachable of 20 links" in page.text
    assert said in page.text
    assert "The dashed line: links that could not be reached, at most 20." in page.text
    assert {row[0] for row in page.links.values()} == {"unreachable"}
    assert len(page.links) == 20


def add_scans(conn: sqlite3.Connection, *scans: Tuple[float, Dict[str, int]]) -> None:
    for when, broken in scans:
        roots = [
            {"path": path, "state": "error" if count < 0 else "scanned", "broken": count,
             "unreachable": 0}
            for path, count in broken.items()
        ]  # fmt: skip
        summary = json.dumps({"roots": roots})
        insert = "INSERT INTO runs (command, started_utc, summary) VALUES ('scan', ?, ?)"
        conn.execute(insert, (program.format_time(when), summary))


@pytest.fixture
def conn(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(program.open_database(str(tmp_path / "symlinks.db"))) as conn:
        conn.execute("BEGIN")  # nothing here needs the disk
        yield conn


def test_a_scan_of_some_roots_leaves_the_others_as_they_were(conn: sqlite3.Connection) -> None:
    add_scans(conn, (100, {"/a": 3, "/b": 4}), (200, {"/a": 5}), (300, {"/a/b": 9}))
    add_scans(conn, (400, {"/a": -1, "/b": 1}))
    conn.execute("INSERT INTO runs (command, started_utc) VALUES ('scan', '1970-01-01T00:10:00')")
    points = program.trace_scans(conn, ("/a", "/b"))
    assert points[:-1] == [(100, 7, 0), (200, 9, 0), (300, 9, 0), (400, 6, 0)]
    assert points[-1] == points[-2]


@pytest.mark.parametrize("runs", [0, 1, 199, 200, 201, 10000])
def test_many_scans_are_thinned_out_but_the_worst_stays(
    conn: sqlite3.Connection, runs: int
) -> None:
    add_scans(conn, *((n * 100, {"/a": 50 if n == runs - 3 else n % 7}) for n in range(runs)))
    points = program.trace_scans(conn, ("/a",))
    assert min(runs, 100) <= len(points) <= 201
    if runs:
        assert points[-1] == ((runs - 1) * 100, (runs - 1) % 7, 0)
    if runs > 3:
        assert max(broken for _, broken, _ in points) == 50
    assert points == sorted(points)


def test_a_link_is_healed_once_a_day(conn: sqlite3.Connection) -> None:
    events = (
        (1, "/1", "newly_broken"), (1, "/1", "relinked"), (1, "/1", "recovered"),
        (1, "/2", "newly_broken"), (1, "/2", "newly_broken"), (2, "/2", "recovered"),
        (2, "/3", "repaired"), (2, "/3", "recovered"), (2, "/4", "changed"),
        (-1, "/5", "recovered"),
    )  # fmt: skip
    for day, path, action in events:
        row = ((20000 + day) * DAY + 5, path, action)
        conn.execute("INSERT INTO events (ts, path, action) VALUES (?, ?, ?)", row)
    counts = program.count_changes(conn, 20000 * DAY)
    assert counts == {"newly_broken": 2, "relinked": 1, "recovered": 1, "repaired": 1}


# --- Nothing foreign is more than text -------------------------------------------------------


def test_hostile_names_are_text(refresherr: Refresherr, library: Library) -> None:
    make_hostile(refresherr, library)
    page = report(refresherr)
    tags = [tag for tag, _ in page.tags]
    assert [tags.count(tag) for tag in ("script", "style", "img", "svg", "b", "i")] == [
        1, 1, 0, tags.count("figure") + 1, 0, 0,
    ]  # fmt: skip
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("href", "data:,").startswith(("data:,", "#"))
        assert not attributes.keys() & {"src", "srcset", "action", "style", "autofocus"}
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert all(line.isprintable() for line in page.source.split("\n"))
    paths = "".join(page.links)
    for name in HOSTILE:
        assert paths.count(program.escape(name.replace("|", "\u2215"))) == 3  # target, too
    assert "</script>pwned" not in page.source
    assert "http://***@relay/find?type=<script>pwned</script>&token=***" in page.text
    assert SECRET not in page.source


def test_no_secret_of_the_config(made_up: Refresherr) -> None:
    page = report(made_up)
    for key in re.findall(r"api_key = (\S+)", CONFIG):
        assert key not in page.source


def test_the_policy_allows_our_script_and_style_only(made_up: Refresherr) -> None:
    import base64
    import hashlib

    page = report(made_up)
    policies = [a["content"] for _, a in page.tags if "http-equiv" in a]
    assert len(policies) == 1
    rules: Dict[str, List[str]] = {}
    for rule in policies[0].split(";"):
        name, *sources = rule.split()
        rules[name] = sources
    for tag in ("script", "style"):
        (text,) = re.findall(f"(?s)<{tag}>(.*?)</{tag}>", page.source)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == [f"'sha256-{digest}'"]
    assert rules.pop("img-src") == ["data:"]
    assert rules == {name: ["'none'"] for name in ("default-src", "base-uri", "form-action")}
    top = page.source.index("Content-Security-Policy")
    assert top < page.source.index("<style") < page.source.index("<script")


def test_charts_have_words(made_up: Refresherr) -> None:
    page = report(made_up)
    charts = re.findall(r"(?s)<svg([^>]*)>(.*?)</svg>", page.source)
    assert len(charts) == 3
    for attributes, body in charts:
        assert 'role="img"' in attributes
        assert "aria-label=" in attributes or re.search("<title>.+?</title><desc>.+?</desc>", body)


def test_a_bar_hides_nothing(refresherr: Refresherr, write_config: Callable[[str], Path]) -> None:
    write_config(CONFIG)
    make_library(refresherr.data_dir, 30000, 1, 1)
    page = report(refresherr)
    widths = [float(a["width"]) for t, a in page.tags if t == "rect" and "x" in a and len(a) == 4]
    assert len(widths) == 3  # one root has both
    assert min(widths) > 0.5
    assert max(widths) <= 100


# --- Size ------------------------------------------------------------------------------------


def test_a_big_library(refresherr: Refresherr, write_config: Callable[[str], Path]) -> None:
    write_config(CONFIG)
    make_library(refresherr.data_dir, 100000, 5003, 50, 20000)
    answer = refresherr("report", "--json").json
    assert (answer["links"], answer["shown"]) == (5004, 5000)
    assert answer["size_bytes"] < 3_000_000
    page = Page(Path(answer["file"]))
    assert len(page.links) == 5000
    assert "4 more are not shown; refresherr broken lists them" in page.text


def test_ownership_is_looked_up_by_an_index(conn: sqlite3.Connection) -> None:
    """It is asked for every broken link; without an index each reads the whole table."""
    asked: List[str] = []
    conn.set_trace_callback(asked.append)
    settings = program.InstanceSettings(url="http://x", api_key="x")
    instances = [program.Instance(kind, kind, settings) for kind in program.KINDS]
    assert program.find_owner(conn, instances, "/tv/a.mkv", "/mnt/a.mkv") is None
    conn.set_trace_callback(None)
    plans = ["\n".join(row[3] for row in conn.execute(f"EXPLAIN QUERY PLAN {q}")) for q in asked]
    assert len(plans) == 4
    for plan in plans:
        assert re.search(r"ix_(episode|movie)_files_path \(original_path=\?", plan)
        assert "SCAN" not in plan


# --- The file --------------------------------------------------------------------------------


def test_the_file_is_written_whole(made_up: Refresherr, tmp_path: Path) -> None:
    folder = tmp_path / "web"
    folder.mkdir()
    file, old = folder / "report.html", tmp_path / "old"
    file.write_text("of before")
    os.link(file, old)
    old.chmod(0o644)
    result = made_up("report", "--output", file)
    assert (result.code, result.err) == (0, "")
    assert str(file) in result.out
    assert old.read_text() == "of before"  # replaced, not overwritten
    assert os.listdir(folder) == ["report.html"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    answer = made_up("report", "--json", "--output", file).json
    assert answer["command"] == "report"
    assert answer["file"] == str(file)
    assert answer["size_bytes"] == file.stat().st_size
    assert answer["links"] == answer["shown"] == 61
    assert not (made_up.data_dir / "report.html").exists()


def test_a_file_that_cannot_be_written(made_up: Refresherr, tmp_path: Path) -> None:
    for file in (tmp_path / "absent" / "x.html", tmp_path):
        result = made_up("report", "--output", file)
        assert result.code == 1
        assert len(result.err.splitlines()) == 1
        assert str(file) in result.err
    assert not list(tmp_path.rglob("*.tmp*"))


def test_the_picture_of_the_readme_is_small() -> None:
    picture = Path(report_library.__file__).parent / "report.png"
    assert picture.stat().st_size < 150_000


def test_times_of_any_kind() -> None:
    now: Any = time.time()
    shown = program.format_time(now)[:16]
    assert program._moment(now) == f"<time datetime={shown}Z>{shown.replace('T', ' ')} UTC</time>"
    assert program._moment("1700000000", "day").endswith("Z class=day>2023-11-14</time>")
    assert [program._moment(odd) for odd in (None, "", "1e300", "soon")] == ["", "", "1e300", ""]
