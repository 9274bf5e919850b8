"""The face of the program: its JSON, exit statuses, options, colours, and hostile names."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
from conftest import PROGRAM, Library, Refresherr, Result
from fuse_fs import FuseMount, fuse_available

import refresherr as program

HOSTILE = [
    b"new\nline.mkv",
    b"esc\x1b[31m\x07.mkv",
    "rtl\u202egnp\u200f.mkv".encode(),
    b"not utf-8 \xff\xfe.mkv",
    b"tab\tcr\r.mkv",
    "c1 \x9b31m \u2028.mkv".encode(),
    "fine \U0001f600 \u00fc.mkv".encode(),
]
HOSTILE_FOLDER = b'dir \xff "quoted" back\\slash\nnew \x1b]0;title\x07'


def assert_one_line(result: Result, *words: str) -> None:
    assert len(result.err.splitlines()) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


def only_printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def add_rows(refresherr: Refresherr, count: int, status: str = "broken") -> None:
    """Put links into the database that no scan has seen; faster than a library of so many."""
    refresherr.make_database()
    with closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
        conn.executemany(
            "INSERT INTO symlinks (path, last_target, status, last_status) VALUES (?, ?, ?, ?)",
            [(f"/tv/Show/{n:06}.mkv", f"/mnt/{n}", status, status) for n in range(count)],
        )


@pytest.fixture
def broken_library(refresherr: Refresherr, library: Library) -> Library:
    """A scanned library: hostile names, all broken, beside a healthy season."""
    library.season("Show", 5)
    for name in HOSTILE:
        library.link(os.fsdecode(name), f"gone/{os.fsdecode(name)}", exists=False)
    folder = os.fsdecode(HOSTILE_FOLDER)
    for number in range(2):
        library.link(f"{folder}/{number}.mkv", f"gone/{number}", exists=False)
    (library.mount / "gone" / "neighbour").write_text("so that the folder is not empty")
    refresherr.scan(library.root)
    accepted = refresherr.scan("--accept-breakage", library.root)
    assert accepted["totals"]["broken"] == len(HOSTILE) + 2
    return library


# --- The JSON envelope -----------------------------------------------------------------------

Stage = Callable[[Refresherr, Library], List[object]]


def just(*words: object) -> Stage:
    return lambda refresherr, library: refresherr.make_database() or list(words)


def scan(*words: object) -> Stage:
    return lambda refresherr, library: ["scan", library.root, *words]


def a_directory_for_a_database(refresherr: Refresherr, library: Library) -> List[object]:
    refresherr.db_path.mkdir(parents=True)
    return ["broken"]


def a_wrong_config(refresherr: Refresherr, library: Library) -> List[object]:
    file = library.root / "x.ini"
    file.write_text("[scann]\n")
    return ["scan", "--config", file]


def no_database_file(refresherr: Refresherr, library: Library) -> List[object]:
    refresherr.data_dir.mkdir()
    refresherr.db_path.write_bytes(b"no database" * 500)
    return ["stats"]


def an_outage(refresherr: Refresherr, library: Library) -> List[object]:
    links = library.season("Show", 20)
    refresherr.scan(library.root)
    for link in links:
        Path(os.readlink(link)).unlink()
    return ["scan", library.root]


def a_missing_root(refresherr: Refresherr, library: Library) -> List[object]:
    library.season("Show", 1)
    return ["scan", library.root, library.root / "absent"]


def a_broken_link(refresherr: Refresherr, library: Library) -> List[object]:
    library.season("Show", 3)
    library.link("gone.mkv", "Show.S01.1080p/gone.mkv", exists=False)
    return ["scan", library.root, "--exit-code"]


@pytest.mark.parametrize(
    ("stage", "code", "status"),
    [
        (just("broken"), 0, "ok"),
        (just("stats"), 0, "ok"),
        (just("stats", "--format", "prometheus"), 0, "ok"),
        (just("doctor"), 0, "ok"),
        (just("db", "path"), 0, "ok"),
        (just("db", "check"), 0, "ok"),
        (just("db", "nuke", "--yes"), 0, "ok"),
        (just("config", "show"), 0, "ok"),
        (just("config", "check"), 0, "ok"),
        (just("config", "sample"), 0, "ok"),
        (scan(), 0, "ok"),
        (scan("-n"), 0, "ok"),
        (a_broken_link, 10, "ok"),
        (just("scan", "--frobnicate"), 2, "error"),
        (just("scan", "--workers", "many"), 2, "error"),
        (just("broken", "--limit", "-1"), 2, "error"),
        (just("broken", "--status", "fine"), 2, "error"),
        (just("db", "nuke"), 2, "error"),
        (just("doctor", "surplus"), 2, "error"),
        (just("frobnicate"), 2, "error"),
        (a_wrong_config, 2, "error"),
        (just("db", "backup", "/proc/absent/x"), 1, "error"),
        (a_directory_for_a_database, 1, "error"),
        (no_database_file, 1, "error"),
        (a_missing_root, 3, "partial"),
        (an_outage, 4, "refused"),
    ],
)
def test_json_is_one_object(
    refresherr: Refresherr, library: Library, stage: Stage, code: int, status: str
) -> None:
    result = refresherr(*stage(refresherr, library), "--json")
    answer = result.json  # which fails on anything before or behind the object
    assert result.code == answer["exit_code"] == code, result
    assert answer["status"] == status
    assert answer["version"] == program.__version__
    assert code in (0, 3, 10) or answer["message"]
    assert "Traceback" not in result.err
    assert only_printable(result.err)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["scan", "--json", "{tmp}"], "scan"),
        (["--json", "--data-dir", "{tmp}", "broken"], "broken"),
        (["--db", "{tmp}/x.db", "db", "path", "--json"], "db"),
        (["--lock-wait", "1", "-v", "config", "check", "--json"], "config"),
        (["--data-dir", "{tmp}", "scan", "--frobnicate", "--json"], "scan"),
        (["--config", "{tmp}/absent", "stats", "--json"], "stats"),
    ],
)
def test_json_names_the_command(
    refresherr: Refresherr, tmp_path: Path, words: List[str], command: str
) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *(word.replace("{tmp}", str(tmp_path)) for word in words)],
        env={**refresherr.env, "DATA_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert json.loads(done.stdout)["command"] == command


def test_json_without_any_command(refresherr: Refresherr) -> None:
    answer = refresherr("--json")
    assert (answer.code, answer.json["status"], answer.json["exit_code"]) == (2, "error", 2)


def test_a_held_lock(refresherr: Refresherr, library: Library) -> None:
    library.season("Show", 1)
    refresherr.data_dir.mkdir()
    with program.process_lock(str(refresherr.db_path), 0):
        started = time.monotonic()
        result = refresherr("scan", library.root, "--lock-wait", "1", "--json")
        assert time.monotonic() - started >= 1
        assert (result.code, result.json["status"]) == (5, "locked")
        assert result.json["message"]
        assert_one_line(result, "lock")
        refresherr.make_database()
        waiting = refresherr.start("scan", library.root, "--lock-wait", "30")
        time.sleep(0.5)
        assert waiting.poll() is None
    assert waiting.communicate(timeout=20)[1] == ""
    assert waiting.returncode == 0


# --- Options, aliases, messages --------------------------------------------------------------


@pytest.mark.parametrize("option", ["--db", "--data-dir", "--config"])
def test_global_options_stand_anywhere(tmp_path: Path, option: str) -> None:
    value = tmp_path / "x"
    expected = {
        "--db": value,
        "--data-dir": value / "symlinks.db",
        "--config": tmp_path / "from file" / "symlinks.db",
    }[option]
    if option == "--config":
        value.write_text(f"[refresherr]\ndata_dir = {tmp_path / 'from file'}\n")
    for words in (
        [option, str(value), "db", "path"],
        ["db", option, str(value), "path"],
        ["db", "path", f"{option}={value}"],
        [option, "/nowhere", "db", "path", option, str(value)],  # the last one counts
    ):
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *words],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            check=True,
        )
        assert done.stdout.decode() == f"{expected}\n"


@pytest.mark.parametrize(
    "option",
    [["--json"], ["-q"], ["-v"], ["-vv"], ["--no-color"], ["--lock-wait", "1"]],
    ids=" ".join,
)
def test_switches_stand_before_and_behind(refresherr: Refresherr, option: List[str]) -> None:
    refresherr.make_database()
    before, behind = refresherr(*option, "broken"), refresherr("broken", *option)
    assert before.code == behind.code == 0
    assert before.out == behind.out
    assert (before.out[:1] == "{") is (option == ["--json"])


def test_the_alias_of_stats(refresherr: Refresherr) -> None:
    add_rows(refresherr, 1)
    assert refresherr("db-stats").out == refresherr("stats").out
    assert refresherr("db-stats", "--json").json["command"] in ("stats", "db-stats")


@pytest.mark.parametrize(
    "words", [["frobnicate"], [], ["scan", "--frobnicate"], ["db", "frobnicate"]]
)
def test_usage_errors_take_one_line(refresherr: Refresherr, words: List[str]) -> None:
    result = refresherr(*words)
    assert (result.code, result.out) == (2, "")
    assert_one_line(result, words[-1] if words else "command")
    assert not refresherr.data_dir.exists()


def test_version_and_help(refresherr: Refresherr) -> None:
    assert refresherr("--version").out.split() == ["refresherr", program.__version__]
    text = refresherr("--help")
    assert (text.code, text.err) == (0, "")
    for command in ("scan", "broken", "stats", "doctor", "db", "config"):
        assert re.search(rf"(?m)^\s+{command}\b", text.out)
        assert refresherr(command, "--help").code == 0


def test_quiet_keeps_warnings_and_errors_only(refresherr: Refresherr, library: Library) -> None:
    make_old = "CREATE TABLE symlinks (path TEXT PRIMARY KEY, last_target TEXT, status TEXT, "
    make_old += "last_status TEXT, first_seen_utc TEXT, last_seen_utc TEXT)"
    for words, silent in (([], False), (["-q"], True)):
        refresherr.data_dir.mkdir(exist_ok=True)
        refresherr.db_path.unlink() if refresherr.db_path.exists() else None
        with closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
            conn.execute(make_old)
            conn.execute("INSERT INTO symlinks (path, status) VALUES ('/a', 'ok')")
        result = refresherr("stats", *words)
        assert result.code == 0
        assert (result.err == "") is silent
    assert "absent" in refresherr("-q", "scan", library.root / "absent").err


def test_a_traceback_only_with_vv(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("a bug with token=x&http://user:S3CRET@host/?token=S3CRET\nin it")

    monkeypatch.setattr(program, "collect_stats", bug)
    for words, shown in (([], False), (["-v"], False), (["-vv"], True), (["-v", "-v"], True)):
        for order in ([*words, "stats"], ["stats", *words]):
            assert program.main(["--data-dir", str(tmp_path), *order]) == 1
            err = capsys.readouterr().err
            assert ("Traceback" in err) is shown
            assert shown or len(err.splitlines()) == 1
            assert "S3CRET" not in err


# --- Terminals -------------------------------------------------------------------------------


def on_a_terminal(
    refresherr: Refresherr, *words: object, stream: str, **env: str
) -> Tuple[int, str]:
    """Run it with stdout or stderr on a terminal; return the exit status and what came there."""
    master, slave = pty.openpty()
    streams: Dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    streams[stream] = slave
    try:
        process = subprocess.Popen(
            refresherr.command(*words),
            env={**refresherr.env, "TERM": "xterm-256color", **env},
            stdin=subprocess.DEVNULL,
            **streams,
        )
        os.close(slave)
        seen = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # EIO: the other side is closed
                break
            if not chunk:
                break
            seen += chunk
        return process.wait(20), seen.decode("utf-8", "replace")
    finally:
        os.close(master)


@pytest.mark.parametrize(
    ("words", "env", "coloured"),
    [
        ([], {}, True),
        ([], {"NO_COLOR": ""}, True),  # no-color.org: "when present and not an empty string"
        ([], {"NO_COLOR": "1"}, False),
        ([], {"TERM": "dumb"}, False),
        (["--no-color"], {}, False),
    ],
)
def test_colour(
    refresherr: Refresherr, words: List[str], env: Dict[str, str], coloured: bool
) -> None:
    add_rows(refresherr, 3)
    code, text = on_a_terminal(refresherr, "stats", *words, stream="stdout", **env)
    assert code == 0
    assert ("\x1b[" in text) is coloured
    assert "\x1b" not in refresherr("stats", *words, env=env).out  # not into a pipe


@pytest.mark.parametrize(
    ("words", "drawn"), [([], True), (["-q"], False), (["--json"], False), (["--quiet"], False)]
)
def test_progress_on_a_terminal(
    refresherr: Refresherr, library: Library, words: List[str], drawn: bool
) -> None:
    for number in range(3000):
        (library.root / str(number)).symlink_to("/etc/hostname")
    code, text = on_a_terminal(refresherr, "scan", library.root, *words, stream="stderr")
    assert code == 0
    assert bool(re.search(r"\r(?!\n)", text)) is drawn
    if drawn:
        assert text.endswith("\r")  # wiped again
    else:
        assert text == ""
        assert "\r" not in refresherr("scan", library.root).err


# --- Hostile names ---------------------------------------------------------------------------


def test_hostile_names_are_escaped_on_the_terminal(
    refresherr: Refresherr, broken_library: Library
) -> None:
    result = refresherr("broken")
    assert only_printable(result.out)
    assert "\ufffd" not in result.out
    for shown in (
        r"new\nline.mkv",
        r"esc\x1b[31m\x07.mkv",
        r"rtl\u202egnp\u200f.mkv",
        r"not utf-8 \xff\xfe.mkv",
        r"tab\tcr\r.mkv",
        r"c1 \x9b31m \u2028.mkv",
        "fine \U0001f600 \u00fc.mkv",
    ):
        assert shown in result.out, shown
    plain = [line for line in result.out.splitlines() if str(broken_library.root) in line]
    assert len(plain) >= len(HOSTILE)
    stats = refresherr("stats", "--top", 50)
    assert only_printable(stats.out)
    assert r'dir \xff "quoted" back\slash\nnew \x1b]0;title\x07' in stats.out.replace("\\\\", "\\")


def test_hostile_names_in_messages(refresherr: Refresherr, library: Library) -> None:
    for name in HOSTILE:
        result = refresherr("scan", library.root / os.fsdecode(name))
        assert result.code != 0
        assert only_printable(result.err + result.out)
        assert "Traceback" not in result.err
        odd = refresherr(os.fsdecode(name))
        assert odd.code == 2
        assert only_printable(odd.err)


def test_hostile_names_survive_json(refresherr: Refresherr, broken_library: Library) -> None:
    root, mount = os.fsencode(broken_library.root), os.fsencode(broken_library.mount)
    expected = {root + b"/" + name: mount + b"/gone/" + name for name in HOSTILE}
    folder = root + b"/" + HOSTILE_FOLDER
    expected.update({folder + b"/%d.mkv" % n: mount + b"/gone/%d" % n for n in range(2)})
    for env in ({}, {"LC_ALL": "C", "LANG": "C"}, {"PYTHONIOENCODING": "ascii"}):
        result = refresherr("broken", "--json", env=env)
        links = result.json["links"]
        assert {os.fsencode(i["path"]): os.fsencode(i["target"]) for i in links} == expected
        assert result.out.isascii()
        top = refresherr("stats", "--json", "--top", 50, env=env).json["top_broken"]
        assert {os.fsencode(entry["directory"]): entry["count"] for entry in top} == {
            root: len(HOSTILE),
            folder: 2,
        }


def test_a_stdout_that_cannot_say_it_all(refresherr: Refresherr, broken_library: Library) -> None:
    for encoding in ("ascii", "latin-1", "utf-8"):
        result = refresherr("broken", env={"PYTHONIOENCODING": encoding})
        assert result.code == 0, result.err
        assert result.err == ""
        assert "fine " in result.out


# --- broken ----------------------------------------------------------------------------------


def test_broken_limit_and_status(refresherr: Refresherr, library: Library) -> None:
    add_rows(refresherr, 12)
    with closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
        conn.execute("UPDATE symlinks SET status='missing', last_status='missing' WHERE rowid > 9")
        conn.execute("UPDATE symlinks SET status='ok', last_status='ok' WHERE rowid = 1")
        conn.execute("UPDATE symlinks SET status='unreachable' WHERE rowid IN (2, 3)")

    def shown(*words: object) -> Tuple[int, int]:
        answer = refresherr("broken", "--json", *words).json
        wanted = words[1] if words[:1] == ("--status",) else "broken"
        assert {link["status"] for link in answer["links"]} <= {wanted}
        return len(answer["links"]), answer["count"]

    assert shown() == (6, 6)
    assert shown("--limit", 4) == (4, 6)
    assert shown("--limit", 0) == (0, 6)
    assert shown("--limit", 100) == (6, 6)
    assert shown("--status", "broken") == (6, 6)
    assert shown("--status", "missing") == (3, 3)
    assert shown("--status", "unreadable") == (0, 0)
    assert shown("--status", "unreachable", "--limit", 1) == (1, 2)
    text = refresherr("broken", "--limit", 4).out
    assert text.count("/tv/Show/") == 4
    assert "6" in text.splitlines()[-1]


def test_broken_lists_what_needs_attention(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path]
) -> None:
    """The broken ones, and those that went with their file record and did not come back."""
    add_rows(refresherr, 8)
    with closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
        paths = [path for (path,) in conn.execute("SELECT path FROM symlinks ORDER BY path")]
        update = "UPDATE symlinks SET status = ?1, last_status = ?1 WHERE path = ?2"
        states = ["ok", "unreachable", *["missing"] * 4, "broken", "ok"]
        conn.executemany(update, zip(states, paths))
        for number, status in ((2, "failed"), (3, "sent"), (4, "repaired")):
            insert = "INSERT INTO actions (url, status, related_path) VALUES (?, ?, ?)"
            conn.execute(insert, (f"arr://sonarr_tv/repair?path={number}", status, paths[number]))
        update = "UPDATE symlinks SET read_error = 'Input/output error' WHERE path = ?"
        conn.executemany(update, [(paths[7],), (paths[5],)])

    def shown(*words: object) -> Tuple[List[str], int]:
        answer = refresherr("broken", "--json", *words).json
        return [link["path"] for link in answer["links"]], answer["count"]

    attention = [paths[6], paths[2], paths[3]]
    assert shown() == shown("--status", "attention") == (attention, 3)
    assert shown("--limit", 2) == (attention[:2], 3)
    assert shown("--status", "missing") == (paths[2:6], 4)
    assert shown("--status", "broken") == ([paths[6]], 1)
    assert shown("--status", "unreadable") == ([paths[7]], 1)
    (link,) = refresherr("broken", "--status", "unreadable", "--json").json["links"]
    assert (link["status"], link["error"]) == ("unreadable", "Input/output error")
    write_config(f"[scan]\nroots = {os.path.dirname(paths[0])}2\n")
    for status in ("attention", "missing", "unreadable", "unreachable"):
        assert shown("--status", status) == ([], 0)


def test_broken_tells_what_it_is(refresherr: Refresherr, library: Library) -> None:
    library.season("Some Show", 3)
    library.link("Some Show/Season 01/Some Show - S01E04-E05.mkv", "a/x.mkv", exists=False)
    library.link("Film (2010) {tmdb-7}/Film (2010).mkv", "a/y.mkv", exists=False)
    library.link("Some Show/Season 01/Some Show - S01E06.mkv", "a/z.mkv")
    refresherr.scan(library.root)
    links = {link["kind"]: link for link in refresherr("broken", "--json").json["links"]}
    keys = {"path", "target", "status", "since", "kind", "name", "season", "episodes"}
    for link in links.values():
        assert keys | {"instance", "file_id", "next"} <= link.keys()
        assert program.parse_time(link["since"])
        assert link["next"]
    episode, movie = links["episode"], links["movie"]
    assert (episode["name"], episode["season"], episode["episodes"]) == ("Some Show", 1, [4, 5])
    assert (movie["name"], movie["season"], movie["episodes"]) == ("Film (2010)", None, [])


# --- stats -----------------------------------------------------------------------------------


def test_rows_below_no_root_count_nowhere(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path]
) -> None:
    """A library that has moved: what is known of its old place worries nobody any more."""
    new = library.link("new/Show/Show - S01E01.mkv", "a/1.mkv", exists=False)
    old = library.link("new, old/Show/Show - S01E02.mkv", "a/2.mkv", exists=False)
    for number in range(20):  # what stays says that the mount is well
        library.link(f"well/{number}/1.mkv", f"a/{number} is well.mkv")
    write_config("[repair]\nmin_age = 0\n[relay]\nbase = http://127.0.0.1:1\n"
                 f"routes = {library.root} => sonarr_tv\n")  # fmt: skip
    assert refresherr.scan(library.root)["totals"]["broken"] == 2
    assert refresherr("stats", "--json").json["symlinks"]["broken"] == 2
    text = Path(refresherr.env["REFRESHERR_CONFIG"]).read_text()
    write_config(f"[scan]\nroots = {new.parent.parent}\n{text}")
    assert [link["path"] for link in refresherr("broken", "--json").json["links"]] == [str(new)]
    stats = refresherr("stats", "--json").json
    assert (stats["symlinks"]["broken"], stats["symlinks"]["total"]) == (1, 1)
    assert [entry["directory"] for entry in stats["top_broken"]] == [str(new.parent)]
    assert 'symlinks{status="broken"} 1\n' in refresherr("stats", "--format", "prometheus").out
    report = refresherr("report", "--json").json
    page = Path(report["file"]).read_text()
    assert report["links"] == 1 and str(new) in page and str(old) not in page
    queue = refresherr("queue", "--json").json
    assert [action["related_path"] for action in queue["queued"]] == [str(new)], queue
    with closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
        insert = "INSERT INTO actions (url, status, related_path) VALUES (?, 'failed', ?)"
        conn.executemany(insert, [("arr://x/repair?path=1", str(old))] * 3)
        conn.execute("UPDATE actions SET fired_utc = '2999-01-01'")
    assert refresherr("stats", "--json").json["repairs"]["needs_attention"] == 0


def test_stats_json(refresherr: Refresherr, broken_library: Library) -> None:
    answer = refresherr("stats", "--json").json
    assert answer["symlinks"] == {
        "ok": 5,
        "broken": len(HOSTILE) + 2,
        "unreachable": 0,
        "missing": 0,
        "total": len(HOSTILE) + 7,
    }
    assert [entry["count"] for entry in answer["top_broken"]] == [len(HOSTILE), 2]
    assert answer["actions"] == {}
    assert answer["media"] == {"movies": 0, "movie_files": 0, "series": 0, "episode_files": 0}
    assert isinstance(answer["repairs"], dict)
    assert answer["last_scan"]
    size = answer["database"].pop("size_bytes")
    assert size == refresherr.db_path.stat().st_size
    assert answer["database"] == {
        "path": str(refresherr.db_path),
        "schema_version": 4,
        "journal_mode": "wal",
    }
    assert len(refresherr("stats", "--json", "--top", 1).json["top_broken"]) == 1
    plain = json.loads(refresherr("stats", "--format", "json").out)
    assert plain["symlinks"] == answer["symlinks"]


def test_stats_text_has_bars(refresherr: Refresherr) -> None:
    add_rows(refresherr, 3000)
    with closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
        conn.execute("UPDATE symlinks SET status='ok', last_status='ok' WHERE rowid > 1000")
        conn.execute("UPDATE symlinks SET status='missing', last_status='missing' WHERE rowid = 1")
    rows = re.findall(r"(?m)^ +(\w+) +([\d,]+)(?: +(\S+))?$", refresherr("stats").out)
    lines = {word: (number, len(bar)) for word, number, bar in rows}
    assert [lines[word][0] for word in ("ok", "broken", "missing", "unreachable", "total")] == [
        "2,000",
        "999",
        "1",
        "0",
        "3,000",
    ]
    bars = [lines[word][1] for word in ("ok", "broken", "missing", "unreachable")]
    assert bars[0] > bars[1] > bars[2] > bars[3] == 0


LABEL = r'[a-z_]+="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"([a-z_]+)(?:\{{((?:{LABEL},?)*)\}})? (\S+)")


def parse_prometheus(text: str) -> Dict[str, Dict[Tuple[Tuple[str, str], ...], float]]:
    """Read the text format as strictly as a collector does."""
    assert text.endswith("\n")
    metrics: Dict[str, Dict[Tuple[Tuple[str, str], ...], float]] = {}
    described: List[str] = []
    for line in text[:-1].split("\n"):
        comment = re.fullmatch(r"# (HELP|TYPE) ([a-z_]+) (.+)", line)
        if comment:
            kind, name, rest = comment.groups()
            assert kind != "TYPE" or rest in ("gauge", "counter")
            described.append(f"{kind} {name}")
            continue
        sample = re.fullmatch(
            r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)', line
        )
        assert sample, line
        name, labels, value = sample.groups()
        assert described[-2:] == [f"HELP {name}", f"TYPE {name}"]
        pairs = re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', labels or "")
        key = tuple((label, unescaped(text)) for label, text in pairs)
        assert key not in metrics.setdefault(name, {})
        metrics[name][key] = float(value)
    assert len(set(described)) == len(described)
    return metrics


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: {"n": "\n"}.get(match.group(1), match.group(1)), text)


def test_prometheus(refresherr: Refresherr, broken_library: Library) -> None:
    with closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
        conn.execute("""INSERT INTO actions (url, status) VALUES ('arr://x', 'odd "\n\\ one')""")
    text = refresherr("stats", "--format", "prometheus")
    assert (text.code, text.err) == (0, "")
    metrics = parse_prometheus(text.out)
    assert all(name.startswith("refresherr_") for name in metrics)
    counts = {value for samples in metrics.values() for value in samples.items()}
    assert ((("status", "broken"),), float(len(HOSTILE) + 2)) in counts
    assert ((("status", "ok"),), 5.0) in counts
    assert ((("status", 'odd "\n\\ one'),), 1.0) in counts
    labels = [value for samples in metrics.values() for key in samples for _, value in key]
    folder = [label for label in labels if '"quoted" back\\slash\nnew \x1b]0;title' in label]
    assert len(folder) == 1


@pytest.mark.parametrize(
    ("kind", "mode"), [("prometheus", 0o644), ("json", 0o600), ("text", 0o600)]
)
def test_output_is_written_whole(
    refresherr: Refresherr, tmp_path: Path, kind: str, mode: int
) -> None:
    add_rows(refresherr, 3)
    folder = tmp_path / "collector"
    folder.mkdir()
    file, old = folder / "refresherr.prom", tmp_path / "old"
    file.write_text("of before\n")
    os.link(file, old)
    done = subprocess.run(
        refresherr.command("stats", "--format", kind, "--output", file),
        env=refresherr.env,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.umask(0o077 if mode == 0o644 else 0),
        check=True,
    )
    assert done.stdout == b""
    assert old.read_text() == "of before\n"  # replaced, not overwritten
    assert os.listdir(folder) == ["refresherr.prom"]
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert file.read_text() == refresherr("stats", "--format", kind).out
    if kind == "prometheus":
        assert parse_prometheus(file.read_text())


def test_output_that_cannot_be_written(refresherr: Refresherr, tmp_path: Path) -> None:
    refresherr.make_database()
    for file in (tmp_path / "absent" / "x.prom", tmp_path):
        result = refresherr("stats", "--format", "prometheus", "--output", file)
        assert result.code == 1
        assert_one_line(result, str(file))
    assert not list(tmp_path.rglob("*.tmp*"))


# --- Pipes and signals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["broken"], ["broken", "--json"], ["-v", "broken"]], ids=" ".join
)
def test_a_reader_that_has_had_enough(refresherr: Refresherr, words: List[str]) -> None:
    add_rows(refresherr, 5000)
    process = refresherr.start(*words)
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(20) in (0, -signal.SIGPIPE, 128 + signal.SIGPIPE)
    process.stderr.close()


@pytest.mark.parametrize(
    "words",
    [["stats"], ["stats", "--json"], ["config", "sample"], ["--help"], ["--version"]],
    ids=" ".join,
)
def test_a_reader_that_was_never_there(refresherr: Refresherr, words: List[str]) -> None:
    refresherr.make_database()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        refresherr.command(*words),
        env=refresherr.env,
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert done.stderr == b""


def test_a_stdout_that_is_full(refresherr: Refresherr) -> None:
    refresherr.make_database()
    for words in (["stats"], ["stats", "--json"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                refresherr.command(*words),
                env=refresherr.env,
                stdout=full,
                stderr=subprocess.PIPE,
                check=False,
            )
        assert done.returncode == 1
        assert b"Traceback" not in done.stderr
        assert b"Exception ignored" not in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_closed_streams(refresherr: Refresherr) -> None:
    refresherr.make_database()
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *refresherr.command("stats")]
    done = subprocess.run(command, env=refresherr.env, stderr=subprocess.PIPE, check=False)
    assert b"Traceback" not in done.stderr
    assert b"internal error" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_scan(
    refresherr: Refresherr, library: Library, tmp_path: Path, number: signal.Signals
) -> None:
    reason = fuse_available()
    if reason:
        pytest.skip(reason)
    source, point = tmp_path / "source", tmp_path / "cloud"
    source.mkdir()
    point.mkdir()
    for name in range(30):
        (source / str(name)).write_text("video")
        (library.root / f"{name}.mkv").symlink_to(point / str(name))
    with FuseMount(str(point), str(source)) as cloud:
        cloud.hang()
        before = cloud.requests()
        process = refresherr.start("scan", library.root, "--json")
        for _ in range(200):
            if cloud.requests() > before:
                break
            time.sleep(0.05)
        process.send_signal(number)
        started = time.monotonic()
        out, err = process.communicate(timeout=20)
        assert time.monotonic() - started < 10
        assert process.returncode == 130
        assert json.loads(out)["status"] == "interrupted"
        assert json.loads(out)["exit_code"] == 130
        assert "Traceback" not in err
    assert refresherr.scan(library.root)["exit_code"] in (0, 4)  # the lock is free again
    assert refresherr("db", "check").code == 0


# --- Tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("M\u00e4h \U0001f600 \u65e5\u672c", "M\u00e4h \U0001f600 \u65e5\u672c"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x1b[0m\x00\x7f\x9b", r"\x1b[0m\x00\x7f\x9b"),
        (os.fsdecode(b"\xff\x80"), r"\xff\x80"),
        ("\u202e\u2066\u200b\u2028\ufeff", r"\u202e\u2066\u200b\u2028\ufeff"),
        ("\ud83d", r"\ud83d"),
        ("\U000e0001", r"\U000e0001"),
        ("", ""),
    ],
)
def test_escape(text: str, shown: str) -> None:
    assert program.escape(text) == shown
    assert program.escape(text).isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nothing here", "nothing here"),
        ("http://r/find?a=1&token=S&b=2", "http://r/find?a=1&token=***&b=2"),
        ("GET http://r/?token=S failed", "GET http://r/?token=*** failed"),
        ("'http://r/?apikey=S', 'x'", "'http://r/?apikey=***', 'x'"),
        ("http://r/?Api_Key=S#frag", "http://r/?Api_Key=***#frag"),
        ("http://p/?X-Plex-Token=S", "http://p/?X-Plex-Token=***"),
        ("http://u:S@h/x and https://S@h", "http://***@h/x and https://***@h"),
        ("http://u:S@S@h/x", "http://***@h/x"),
        ("HTTP://u:S@h/?TOKEN=S", "HTTP://***@h/?TOKEN=***"),
        ("http://h/x?term=token", "http://h/x?term=token"),
        ("http://h/a@b?mail=me@x.org", "http://h/a@b?mail=me@x.org"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert program.redact(text) == shown


@pytest.mark.parametrize(
    ("url", "bare"),
    [
        ("http://r/find?type=a&term=b&token=S", "http://r/find?type=a&term=b"),
        ("http://r/find?token=S&type=a", "http://r/find?type=a"),
        ("http://r/find?type=a&token=S&term=b", "http://r/find?type=a&term=b"),
        ("http://r/find?token=S", "http://r/find"),
        ("http://r/find?a=1&token=S&token=S", "http://r/find?a=1"),
        ("http://r/find?a=1&apikey=S", "http://r/find?a=1"),
        ("http://u:S@r/find?a=1", "http://r/find?a=1"),
        ("http://r/find?term=Who+Are+You?&token=S", "http://r/find?term=Who+Are+You?"),
        ("http://r/find?term=token", "http://r/find?term=token"),
        ("http://r/find?tokens=3", "http://r/find?tokens=3"),
        ("http://r/find?", "http://r/find?"),
        ("arr://tv/repair?path=%2Fa%3Ftoken%3Db", "arr://tv/repair?path=%2Fa%3Ftoken%3Db"),
    ],
)
def test_strip_secrets(url: str, bare: str) -> None:
    assert program.strip_secrets(url) == bare
    assert program.strip_secrets(bare) == bare


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("0", 0),
        ("15m", 900),
        ("6h", 21600),
        ("2d", 172800),
        ("1.5h", 5400),
        (" 3S ", 3),
    ],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert program.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1", "1x", "1h30", "nan", "inf", "1e3", "1 2"])
def test_parse_duration_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"6h"):
        program.parse_duration(text)


@pytest.mark.parametrize(
    ("value", "epoch"),
    [
        ("2024-05-06T07:08:09", 1714979289),
        ("2024-05-06 07:08:09", 1714979289),
        ("2024-05-06T07:08:09+00:00", 1714979289),
        ("2024-05-06T07:08:09Z", 1714979289),
        ("2024-05-06T09:08:09+02:00", 1714979289),
        ("2024-05-06T07:08:09.250000", 1714979289.25),
        ("1714979289", 1714979289),
        (" 1714979289.25 ", 1714979289.25),
        (1714979289, 1714979289),
        (1714979289.25, 1714979289.25),
        (None, None),
        ("", None),
        ("yesterday", None),
        ("2024-13-01T00:00:00", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_parse_time(value: Any, epoch: Optional[float]) -> None:
    assert program.parse_time(value) == epoch


@pytest.mark.parametrize(
    ("path", "media"),
    [
        ("/tv/Show/Season 01/Show - S01E02 - Pilot.mkv", ("episode", "Show", 1, (2,))),
        ("/tv/Show (2019)/Season 2/show.s02e10.1080p.mkv", ("episode", "Show (2019)", 2, (10,))),
        ("/tv/Show/Season 1/Show S01E01E02.mkv", ("episode", "Show", 1, (1, 2))),
        ("/tv/Show/Season 1/Show - S01E01-E03.mkv", ("episode", "Show", 1, (1, 2, 3))),
        ("/tv/Show/Season 1/Show - S01E01-03.mkv", ("episode", "Show", 1, (1, 2, 3))),
        ("/tv/Show/Season 1/Show - S01E01-1080p.mkv", ("episode", "Show", 1, (1,))),
        ("/tv/Show/Season 1/Show.1x05.mkv", ("episode", "Show", 1, (5,))),
        ("/tv/Show/Specials/Show - S00E03.mkv", ("episode", "Show", 0, (3,))),
        ("/tv/24/Season 03/24 - S03E04.mkv", ("episode", "24", 3, (4,))),
        ("/dl/Show.Name.S01E02.1080p.WEB.x264-GRP.mkv", ("episode", "Show Name", 1, (2,))),
        ("/tv/News/Season 2024/News - 2024-05-06.mkv", ("episode", "News", 2024, ())),
        ("/m/Film (2010)/Film (2010) 1080p.mkv", ("movie", "Film (2010)", None, ())),
        ("/m/Film (2010) {tmdb-1}/x.mkv", ("movie", "Film (2010)", None, ())),
        ("/m/2012 (2009)/2012 (2009).mkv", ("movie", "2012 (2009)", None, ())),
        ("/m/Blade Runner 2049 (2017)/a.mkv", ("movie", "Blade Runner 2049 (2017)", None, ())),
        ("/m/Film (2010)/Film (2010) 1920x1080.mkv", ("movie", "Film (2010)", None, ())),
        ("/x/readme", ("other", "readme", None, ())),
    ],
)
def test_parse_media(path: str, media: Tuple[Any, ...]) -> None:
    assert tuple(program.parse_media(path)) == media
