"""What a person meets in the first ten minutes: files that must not be replaced, locales, places
that were mistyped, conditions that last, notifiers that do not listen.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest
from conftest import PROGRAM, Library, Refresherr
from fake_servers import FakeServer, Reply, Request

import refresherr as program

READERS = (["broken"], ["stats"], ["report"], ["actions"], ["db", "check"], ["db", "backup", "x"],
    ["queue"], ["dispatch"], ["undo"], ["queue", "-n"], ["dispatch", "--apply"])  # fmt: skip


# What is written, and over what


@pytest.mark.parametrize("words", [["stats", "--output"], ["report", "--output"], ["db", "backup"]])
def test_only_regular_files_are_written(
    refresherr: Refresherr, library: Library, tmp_path: Path, words: List[str]
) -> None:
    refresherr.scan(library.root)
    target, link, fifo = tmp_path / "target", tmp_path / "link", tmp_path / "fifo"
    target.write_text("mine")
    link.symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(fifo)
    device = tmp_path / "null"
    places = [link, fifo, tmp_path / "dangling", tmp_path]
    with contextlib.suppress(OSError):  # a container may forbid it
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        places.append(device)
    for place in places:
        before = os.lstat(place)
        result = refresherr(*words, place)
        assert result.code == 1 and str(place) in result.err, result
        after = os.lstat(place)
        assert (before.st_ino, before.st_mode, before.st_size) == (
            after.st_ino, after.st_mode, after.st_size)  # fmt: skip
    assert target.read_text() == "mine" and not (tmp_path / "nowhere").exists()
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_backup_replaces_nothing_and_the_others_do(
    refresherr: Refresherr, library: Library, tmp_path: Path
) -> None:
    refresherr.scan(library.root)
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    result = refresherr("db", "backup", notes)
    assert result.code == 1 and str(notes) in result.err
    assert notes.read_text() == "mine"
    assert refresherr("report", "--output", notes).code == 0  # whole or not at all, but anew
    assert notes.read_text().startswith("<!doctype html>")


def test_a_dash_is_stdout(refresherr: Refresherr, library: Library, tmp_path: Path) -> None:
    refresherr.scan(library.root)
    assert refresherr("report", "--output", "-").out.startswith("<!doctype html>")
    assert (
        "refresherr_symlinks" in refresherr("stats", "--format", "prometheus", "--output", "-").out
    )
    assert refresherr("report", "--output", "-", "--json").json["exit_code"] == 2
    assert not Path("-").exists()


def test_the_builder_replaces_no_link(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    builder = PROGRAM.parent / "build_zipapp.py"
    for place in (link, tmp_path):
        done = subprocess.run([sys.executable, str(builder), "-o", str(place)], check=False)
        assert done.returncode != 0 and (place.is_symlink() or place.is_dir())


# Where the database is


@pytest.mark.parametrize("words", READERS, ids=" ".join)
def test_what_only_reads_makes_no_database(refresherr: Refresherr, words: List[str]) -> None:
    result = refresherr(*words)
    assert result.code == 1 and result.out == ""
    assert len(result.err.splitlines()) == 1
    assert str(refresherr.db_path) in result.err and "scan" in result.err
    assert "--data-dir" in result.err
    assert not refresherr.data_dir.exists()


def test_doctor_makes_none_and_looks_at_the_rest(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path]
) -> None:
    write_config(f"[scan]\nroots = {library.root}\n")
    result = refresherr("doctor", "--json")
    found = {finding["name"]: finding for finding in result.json["findings"]}
    assert result.code == 1 and "scan" in found["database"]["advice"]
    assert found[f"root {library.root}"]["state"] == "ok"
    assert not refresherr.data_dir.exists()


def test_the_schema_is_looked_at_anew(tmp_path: Path) -> None:
    """SQLite before 3.32 answers PRAGMA table_info from what the connection has read before."""
    path = str(tmp_path / "symlinks.db")
    with contextlib.closing(program.get_connection(path)) as first:
        assert program.schema_version(first) == 0
        program.open_database(path).close()
        program.initialize_schema(first)
        count = first.execute("SELECT count(*) FROM schema_version").fetchone()[0]
    assert count == program.SCHEMA_VERSION
    assert sorted(os.listdir(tmp_path)) == ["symlinks.db"]


def test_the_lock_names_its_holder(refresherr: Refresherr, library: Library) -> None:
    refresherr.make_database()
    with program.process_lock(str(refresherr.db_path), 0, "dispatch"):
        result = refresherr("scan", library.root)
    assert result.code == 5
    assert "`dispatch`" in result.err and str(os.getpid()) in result.err


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, setpriv")
def test_files_of_another_user(refresherr: Refresherr, library: Library, tmp_path: Path) -> None:
    refresherr.scan(library.root)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    refresherr.data_dir.chmod(0o755)
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
        *refresherr.command("stats")]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, env=refresherr.env, check=False)
    if done.returncode == 127 or "can't open file" in done.stderr:
        pytest.skip("the program itself is closed to another user here")
    assert done.returncode == 1 and "chown" in done.stderr, done


# Names are bytes


def other_locale(folder: Path) -> Dict[str, str]:
    """Return the environment of a shell that is not UTF-8."""
    made = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")],
        capture_output=True, check=False,
    ) if shutil.which("localedef") else None  # fmt: skip
    if made and (folder / "de_DE.ISO-8859-1").is_dir():
        return {"LOCPATH": str(folder), "LANG": "de_DE.ISO-8859-1"}
    return {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII


def test_a_link_has_one_name_in_every_locale(
    refresherr: Refresherr, library: Library, tmp_path: Path
) -> None:
    for name in ("é.mkv", "日本.mkv", os.fsdecode(b"\xe9.mkv")):
        library.link(f"Show/{name}")
    (tmp_path / "locales").mkdir()
    del refresherr.env["LANG"]
    locales = [{"LANG": "C.UTF-8"}, other_locale(tmp_path / "locales"), {"LC_ALL": "C"}, {}]
    news = [refresherr("scan", library.root, env=env).out.splitlines()[-1] for env in locales]
    assert news[0].startswith("3 new, 0 newly broken")
    for line in news[1:]:
        assert line.startswith("0 new, 0 newly broken, 0 recovered, 0 vanished"), news
    assert len(refresherr.query("SELECT path FROM symlinks")) == 3


def test_two_slashes_are_one(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path]
) -> None:
    library.season("Show", 3)
    write_config(f"[scan]\nroots = /{library.root}/\n")
    for root in ("/" + str(library.root), str(library.root) + "//", str(library.root)):
        assert refresherr.scan(root)["totals"]["examined"] == 3
    refresherr.scan()
    assert len(refresherr.query("SELECT path FROM symlinks")) == 3


# What is said


def test_what_cannot_be_judged_is_told_with_place_reason_and_cure(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path]
) -> None:
    """A target with a name too long for any look-up stands for EACCES, which root never meets."""
    library.season("Show", 3)
    odd = library.root / "odd.mkv"
    odd.symlink_to("/" + "x" * 300)
    write_config(f"[scan]\nroots = {library.root}\n")
    result = refresherr("scan")
    assert result.code == 3
    told = [line for line in result.err.splitlines() if "cannot be judged" in line]
    assert len(told) == 1 and "/xxx" in told[0] and "File name too long" in told[0]
    message = refresherr("scan", "--json").json["message"]
    assert message in told[0]
    findings = {f["name"]: f for f in refresherr("doctor", "--json").json["findings"]}
    assert message in findings["last scan"]["detail"]  # one text


def test_a_lasting_condition_is_told_once_and_its_end_once(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path]
) -> None:
    library.season("Show", 3)
    write_config(f"[scan]\nroots = {library.root}\n  {library.root}-absent\n")
    first, second = refresherr("-q", "run"), refresherr("-q", "run")
    assert first.code == second.code == 3
    assert "-absent" in first.err
    assert second.out + second.err == ""
    assert "-absent" in refresherr("run").err  # without -q it is always told
    Path(f"{library.root}-absent").mkdir()
    third, fourth = refresherr("-q", "run"), refresherr("-q", "run")
    assert third.code == fourth.code == 0
    assert "no longer: scan partial" in third.out and fourth.out + fourth.err == ""
    assert "--apply does it" in refresherr("run").out
    assert "--apply does it" not in refresherr("run", "-n", "--apply").out


def test_a_log_file(refresherr: Refresherr, library: Library, tmp_path: Path) -> None:
    file = tmp_path / "log"
    for _ in range(2):
        assert refresherr("scan", f"{library.root}-absent", "--log-file", file).code == 1
    lines = file.read_text().splitlines()
    assert len(lines) == 2 and all("-absent" in line for line in lines)
    assert file.stat().st_mode & 0o777 == 0o600
    assert refresherr("scan", library.root, "--log-file", tmp_path).code == 1


def test_advice_names_what_was_typed(refresherr: Refresherr, library: Library) -> None:
    assert "--data-dir" in refresherr("--data-dri", "./data", "scan").err
    refresherr.program = PROGRAM
    assert (
        f"python3 {PROGRAM}" in refresherr("stats").err or str(PROGRAM) in refresherr("stats").err
    )
    refresherr.scan(library.root)
    assert "has no such option" in refresherr("stats", "--apply").err


def test_broken_is_grouped_by_title(refresherr: Refresherr, library: Library) -> None:
    for link in library.season("Show", 30):
        Path(os.readlink(link)).unlink()
    library.link("Film (2001)/Film (2001).mkv", "other/film.mkv", exists=False)
    library.link("Good/Good.mkv", "other/good.mkv")
    library.link("Show/Season 02/Show - S02E01.mkv", "Show.S01.1080p/x.mkv")
    refresherr.scan(library.root)
    text = refresherr("broken").out
    assert len(text.splitlines()) <= 8, text
    assert "Show S01: 30 links" in text and "Film (2001).mkv" in text
    text = refresherr("broken", "--links").out
    assert text.count("Show - S01E") == 30
    count = {words: refresherr("broken", "--json", *words.split()).json["count"]
        for words in ("", "--path Film", "--owner none", "--owner sonarr_x",
            f"--root {library.root}/Show")}  # fmt: skip
    assert list(count.values()) == [31, 1, 31, 0, 30]


# Help


def test_help_version_completion(refresherr: Refresherr, tmp_path: Path) -> None:
    assert refresherr("version").out == refresherr("--version").out
    text = refresherr("help", "run").out
    assert "--every" in text and "default: " in text
    assert refresherr("help", "scna").code == 2
    for shell in ("bash", "zsh", "fish"):
        script = refresherr("completion", shell).out
        assert "--forget-mount" in script and "prometheus" in script
        if shutil.which(shell):
            file = tmp_path / shell
            file.write_text(script)
            assert subprocess.run([shell, "-n", str(file)], check=False).returncode == 0
    ask = """. "$0"; COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _refresherr; echo "${COMPREPLY[@]}" """
    for typed, answer in {
        "refresherr --db x scan --acc": "--accept --accept-breakage",
        "refresherr run --acc": "--accept --accept-breakage --accept-shrink",
        "refresherr db-stats --format p": "prometheus",
        "refresherr queue-repairs --m": "--min-age",
        "refresherr act": "actions",
    }.items():
        done = subprocess.run(
            ["bash", "-c", ask, str(tmp_path / "bash"), typed],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.strip() == answer, typed


@pytest.mark.parametrize("words", ["--version", "scan --version", "--help", "scan --help"])
def test_help_and_version_are_one_object_too(refresherr: Refresherr, words: str) -> None:
    plain, result = refresherr(*words.split()), refresherr(*words.split(), "--json")
    assert plain.code == result.code == 0
    assert result.json["text"] == plain.out != ""


def test_a_path_on_the_command_line_may_begin_where_one_stands(
    refresherr: Refresherr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    context = program.parse_arguments(["run", "--data-dir", "data", "--base", "../x"])
    assert vars(context)["refresherr.data_dir"] == str(tmp_path / "data")
    assert vars(context)["cinesync.base"] == str(tmp_path.parent / "x")


def test_nothing_is_said_twice_though_nobody_listens(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path]
) -> None:
    library.season("Show", 3)
    write_config(f"""[scan]
roots = {library.root}
    {library.root}-absent
[sonarr x]
url = http://127.0.0.1:9
api_key = x
[relay]
base = http://127.0.0.1:9
[notify]
webhook = http://127.0.0.1:9/hook
""")
    refresherr.scan(library.root)
    with contextlib.closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
        conn.execute(
            "INSERT INTO actions (url, status) VALUES ('arr://sonarr_x/repair?path=/x', 'pending')"
        )
    first, second = refresherr("run", "-q", "--apply"), refresherr("run", "-q", "--apply")
    assert first.err.count("error: sonarr_x: ") == 1 == first.err.count("warning: webhook: ")
    assert "scan partial" not in second.out and second.out + second.err == ""
    found = {f["name"]: f for f in refresherr("doctor", "--json").json["findings"]}["webhook"]
    assert "webhook" not in found["detail"] and "refused" in found["detail"]
    Path(f"{library.root}-absent").mkdir()
    third, fourth = refresherr("run", "-q", "--apply"), refresherr("run", "-q", "--apply")
    assert third.out.count("no longer: scan partial") == 1 and fourth.out == ""


# The config


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("[sonarr tv]\nurl = http://s\n", 2, "api_key"),
        ("[scan]\nroots = media/tv\n", 2, "whole path"),
        ('[scan]\nroots = "/media/tv"\n', 2, "quotes"),
        ("[scan]\nroots = /media/tv ; my shows\n", 2, "line of its own"),
        ("[scan]\nroots = /nowhere/at/all\n", 0, "does not exist"),
        ("[sonarr tv]\nurl = http://s\napi_key = x\npath_map = tv => /tv\n", 2, "whole path"),
    ],
)
def test_config_check(
    refresherr: Refresherr, write_config: Callable[[str], Path], text: str, code: int, words: str
) -> None:
    write_config(text)
    result = refresherr("config", "check")
    assert result.code == code and words in result.err, result


def test_names_of_the_environment_that_are_none(refresherr: Refresherr) -> None:
    result = refresherr("config", "check", env={"REFRESHERR_SCAN_ROOTZ": "/x"})
    assert "REFRESHERR_SCAN_ROOTZ" in result.err and "REFRESHERR_SCAN_ROOTS" in result.err


# Who is told


class Deaf(FakeServer):
    """A webhook and a monitor that answer 404 until they are mended."""

    status = 404

    def answer(self, request: Request) -> Reply:
        return Reply(self.status, b"{}", {"Content-Type": "application/json"})


@pytest.fixture
def deaf() -> Iterator[Deaf]:
    with Deaf() as server:
        yield server


def test_notifiers_that_do_not_listen(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path], deaf: Deaf
) -> None:
    library.season("Show", 3)
    write_config(f"""[scan]
roots = {library.root}
[notify]
webhook = {deaf.url}/hook
healthchecks = {deaf.url}/beat
when = always
""")

    def states() -> Dict[str, str]:
        findings = refresherr("doctor", "--json").json["findings"]
        return {f["name"]: f["state"] for f in findings if f["name"] in ("webhook", "healthchecks")}

    result = refresherr("-q", "run", "--apply")
    assert result.code == 0
    warnings = [line for line in result.err.splitlines() if "404" in line]
    assert sorted(line.split()[2] for line in warnings) == ["healthchecks:", "webhook:"]
    assert set(states().values()) == {"failed"}
    deaf.status = 200
    assert refresherr("doctor", "--notify").code in (0, 3)
    assert set(states().values()) == {"ok"}
    asked = {request.path for request in deaf.requests}
    assert "/beat/log" in asked and "/hook" in asked
    notes = dict(refresherr.query("SELECT name, value FROM notes WHERE name LIKE 'told %'"))
    assert json.loads(notes["told webhook"])[1] is None


def test_run_renews_the_report(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path], tmp_path: Path
) -> None:
    library.season("Show", 3)
    page = tmp_path / "page.html"
    write_config(f"[scan]\nroots = {library.root}\n[run]\nreport = {page}\n")
    assert refresherr("run", "-n").code == 0 and not page.exists()
    assert refresherr("run").code == 0
    assert page.read_text().startswith("<!doctype html>")
    page.unlink()
    page.mkdir()
    result = refresherr("run")
    assert result.code == 3 and str(page) in result.err
