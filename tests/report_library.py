"""A made-up library's database, written by SQL: its links, scans, events, repairs and changes.

python3 tests/report_library.py makes tests/report.png of its report, for the README.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from conftest import Library, Refresherr  # noqa: E402

import refresherr as program  # noqa: E402

FORMS = (
    "{} Lane", "The {} Letters", "Nights in {}", "{} & Sons", "A Year of {}", "{} Radio",
    "Beyond {}", "The {} Detectives", "House of {}",
)  # fmt: skip
PLACES = (
    "Ninelamps", "Copperwick", "Marrowhill", "Oule", "Saltcedar", "Lowtide", "Wrenfield",
    "Velvet Hollow", "Thirteen Winters", "Ferrymoor", "Ashmeridian", "Smallrain",
)  # fmt: skip
TV, FILMS = "/media/tv", "/media/movies"
MOUNT = "/mnt/remote/realdebrid/shows"
CONFIG = f"""
[scan]
roots = {TV}, {FILMS}
[sonarr tv]
url = http://127.0.0.1:9
api_key = 0123456789abcdef0123456789abcdef
roots = {TV}
path_map = /media => /data
[radarr main]
url = http://127.0.0.1:9
api_key = fedcba9876543210fedcba9876543210
roots = {FILMS}
"""
DAY = 86400
SECRET = "s3cr3t-0a1b2c"
HOSTILE = (
    "<script>window.pwned = 1<|script>.mkv", "<img src=x onerror='window.pwned = 1'>.mkv",
    "\" onmouseover=\"window.pwned = 1\" x=\".mkv", "' autofocus onfocus='window.pwned = 1'.mkv",
    "<|td><|table><svg onload=window.pwned=1>.mkv", "]]><!-- -- > <title>.mkv",
    "$body ${style}.mkv", "&lt;b&gt;&#60;i&#62;.mkv", "rtl \u202egnp\u200f \u2066.mkv",
    "new\nline\r\t\x1b[31m\x07.mkv", "not utf-8 \udcff\udcfe.mkv",
    "c1 \x9b \u2028 \ufeff.mkv", "fine \U0001f600 \u00fc.mkv",
)  # fmt: skip


class Link(NamedTuple):
    """A row of `symlinks`."""

    path: str
    target: str
    status: str
    broken_since: Optional[float]


def choose_broken(links: int, broken: int) -> Dict[int, float]:
    """Return {number of a broken link: days ago}; what shares a torrent goes at the same time."""
    chance = random.Random(1)
    chosen: Dict[int, float] = {}
    while len(chosen) < broken:
        first, age = chance.randrange(links), chance.expovariate(1 / 4)
        size = min(chance.choice((1, 1, 1, 2, 5, 10)), broken - len(chosen))
        chosen.update({n: age for n in range(first, min(first + size, links)) if n not in chosen})
    return chosen


def make_links(links: int, broken: int, now: float) -> Iterator[Link]:
    """Yield links: shows of six seasons of ten, and every tenth link a film."""
    gone = choose_broken(links, broken)
    for number in range(links):
        show = number // 60
        title = FORMS[show % len(FORMS)].format(PLACES[show % len(PLACES) - show // 36 % 3])
        year = 1990 + show % 35
        title += f" {show // 108 + 1}" if show >= 108 else ""
        if number % 10 == 9:
            title = f"{title}, Part {number % 60 // 10 + 1}"
            path = f"{FILMS}/{title} ({year})/{title} ({year}) Bluray-1080p.mkv"
        else:
            season, episode = number // 10 % 6 + 1, number % 10 + 1
            name = f"{title} - S{season:02d}E{episode:02d} - WEBDL-1080p.mkv"
            path = f"{TV}/{title} ({year})/Season {season:02d}/{name}"
        target = f"{MOUNT}/{title.replace(' ', '.')}.1080p.WEB-DL.x265-GRP/{number:06d}.mkv"
        since = now - gone[number] * DAY if number in gone else None
        yield Link(path, target, program.BROKEN if since else program.OK, since)


def make_scans(conn: Any, runs: int, ok: int, broken: int, now: float) -> None:
    """Write hourly scans, the last one just now, with the ups and downs of a real library."""
    chance, rows = random.Random(2), []
    level = float(broken)
    for age in range(runs):  # backwards
        found = broken if age == 0 else round(level)
        level = max(0.0, level * chance.uniform(0.93, 1.07) + chance.choice((-2, -1, 0, 0, 1, 2)))
        away = 380 if runs > 400 and 0 < age - runs // 3 < runs // 60 else 0
        roots = [
            {"path": TV, "state": "scanned", "broken": found, "unreachable": away},
            {"path": FILMS, "state": "scanned", "broken": 0, "unreachable": 0},
        ]
        totals = {"ok": ok, "broken": found, "unreachable": away, "missing": 0}
        summary = {"roots": roots, "totals": totals, "duration_seconds": 7.4, "guard": {}}
        when = program.format_time(now - 900 - age * 3600)
        rows.append((when, when, 4 if away else 0, json.dumps(summary)))
    conn.executemany(
        "INSERT INTO runs (command, started_utc, finished_utc, exit_code, summary) "
        "VALUES ('scan', ?, ?, ?, ?)",
        reversed(rows),
    )


def make_events(conn: Any, links: List[Link], now: float) -> None:
    """Write seventy days of links that broke and were healed."""
    chance, rows = random.Random(3), []
    for day in range(70):
        sizes = [("newly_broken", chance.choice((2, 3, 5, 8, 21)))]
        sizes += [("relinked", chance.choice((2, 4, 9))), ("recovered", chance.randrange(3))]
        sizes += [("repaired", chance.choice((0, 1, 3)))]
        for action, size in sizes:
            for link in chance.sample(links, size):
                rows.append((int(now - day * DAY), link.path, action))
    conn.executemany("INSERT INTO events (ts, path, action) VALUES (?, ?, ?)", rows)


def make_repairs(conn: Any, links: List[Link], lost: Link, replaced: Link, now: float) -> None:
    """Write actions of all states, two that took their links away, and a CineSync run."""
    outcomes: Tuple[Tuple[str, Optional[str]], ...] = (
        ("repaired", None), ("repaired", None), ("sent", None), ("repaired", None),
        ("failed", "no release was found in 3 searches"), ("pending", None), ("cancelled", None),
    )  # fmt: skip
    for number, link in enumerate([*links[:19], lost, replaced]):
        server = "radarr_main" if link.path.startswith(FILMS) else "sonarr_tv"
        status, error = outcomes[{lost: 4, replaced: 0}.get(link, number % len(outcomes))]
        when = program.format_time(now - (21 - number) * 5000)
        conn.execute(
            "INSERT INTO actions (url, status, reason, related_path, created_utc, fired_utc, "
            "last_error, progress) VALUES (?, ?, 'broken link', ?, ?, ?, ?, ?)",
            (f"arr://{server}/repair?path=x", status, link.path, when, when, error, "{}"),
        )
    update = "UPDATE symlinks SET status = 'missing', last_status = 'missing' WHERE path = ?"
    conn.executemany(update, [(lost.path,), (replaced.path,)])
    when = program.format_time(now - 3000)
    run = "INSERT INTO runs (command, started_utc, exit_code, summary) VALUES ('cinesync', ?, 0, ?)"
    number = conn.execute(run, (when, '{"replaced": 6}')).lastrowid
    for link in links[30:36]:
        copy = link.target.replace("GRP/", "ALT/")
        conn.execute(
            "INSERT INTO link_changes (run_id, path, old_target, new_target, state, changed_utc) "
            "VALUES (?, ?, ?, ?, 'done', ?)",
            (number, link.path, link.target, copy, when),
        )


def make_files(conn: Any, links: List[Link]) -> None:
    """Write what Sonarr has told of some links."""
    conn.executemany(
        "INSERT INTO episode_files (instance, sonarr_series_id, sonarr_file_id, original_path) "
        "VALUES ('sonarr_tv', 1, ?, ?)",
        enumerate(link.path.replace("/media", "/data", 1) for link in links if TV in link.path),
    )


def make_library(
    data_dir: Path, links: int, broken: int, runs: int, files: int = 0, now: float = 0.0
) -> List[Link]:
    """Write a database at its usual place below `data_dir`; return the links in it."""
    now = now or time.time()
    made = list(make_links(links, broken, now))
    with closing(program.open_database(str(data_dir / "symlinks.db"))) as conn:
        conn.execute("BEGIN")
        seen = program.format_time(now - 900)
        conn.executemany(
            "INSERT INTO symlinks (path, last_target, status, last_status, first_seen_utc, "
            "last_seen_utc, broken_since_utc) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (p, t, s, s, seen, seen, since and program.format_time(since))
                for p, t, s, since in made
            ),
        )
        make_files(conn, made[:files])
        gone = [link for link in made if link.status == program.BROKEN]
        make_scans(conn, runs, links - len(gone), len(gone), now)
        if len(gone) > 36:
            make_events(conn, made, now)
            make_repairs(conn, gone, *[link for link in made if not link.broken_since][:2], now)
        conn.execute("COMMIT")
    return made


def make_hostile(refresherr: Refresherr, library: Library) -> None:
    """Scan real links with hostile names, and write such names wherever else names come from.

    There a | is a slash, which no name on the disk can hold.
    """
    names = [name.replace("|", "\u2215") for name in HOSTILE]
    for name in names:
        library.link(f"{name}/{name}", f"gone/{name}", exists=False)
    (library.mount / "gone" / "neighbour").write_text("so that the folder is not empty")
    refresherr.scan(library.root)
    result = refresherr.scan("--accept-breakage", library.root)
    assert result["totals"]["broken"] == len(names)
    url = f"http://me:{SECRET}@relay/find?type=<script>pwned</script>&token={SECRET}"
    with closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
        texts = [name.replace("|", "/") for name in HOSTILE]
        for text in map(program.to_db, texts):
            status = text if isinstance(text, str) else "odd"  # no byte string was ever one
            conn.execute(
                "INSERT INTO actions (url, status, reason, related_path, created_utc, last_error) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (url, status, text, text, text, f"no answer from {url}"),
            )
            conn.execute(
                "INSERT INTO link_changes (run_id, path, old_target, new_target, state, "
                "changed_utc, reason) VALUES (77, ?, ?, ?, ?, '1e300', ?)",
                (text, text, text, text, text),
            )
        conn.execute("INSERT INTO runs VALUES (77, ?, ?, '', 0, '')", (texts[0], texts[0]))
        roots = [{"path": texts[0], "state": "scanned", "broken": 1, "unreachable": 0}]
        message = f"{' '.join(texts[:9])} {url}"
        summary = json.dumps({"message": message, "roots": roots})
        conn.execute("INSERT INTO runs VALUES (78, 'scan', 'now', '', 4, ?)", (summary,))


def make_picture(file: Path) -> None:
    """Write a picture of the top of the report."""
    from browser import Browser, shrink_png

    with tempfile.TemporaryDirectory() as name:
        refresherr = Refresherr(Path(name))
        make_library(refresherr.data_dir, 6212, 48, 2000)
        config = Path(name) / "refresherr.ini"
        config.write_text(CONFIG)
        config.chmod(0o600)
        assert refresherr("--config", config, "report", "-q").code == 0
        page = refresherr.data_dir / "report.html"
        page.write_text(page.read_text().replace(str(refresherr.data_dir), "/data"))
        with Browser(Path(name) / "browser") as browser:
            browser.resize(1000, 1480)
            browser.open(page)
            file.write_bytes(shrink_png(browser.screenshot()))


if __name__ == "__main__":
    make_picture(TESTS / "report.png")
