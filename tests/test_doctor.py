"""The doctor: each thing that can be wrong, really wrong, and what it advises against it."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import pytest
from conftest import PROJECT, Library, Refresherr, target_of
from fake_servers import (
    API_KEY,
    FakeArr,
    FakeRadarr,
    FakeRelay,
    FakeServer,
    FakeSonarr,
    Reply,
    Request,
    as_json,
)
from fuse_fs import FuseMount, fuse_available

import refresherr as program

Write = Callable[[str], Path]
KEY = "media-server-key-4711"
MONTH = 30 * 86400


class Said(NamedTuple):
    """What a run of the doctor said."""

    code: int
    findings: List[Dict[str, str]]
    text: str  # everything

    def of(self, name: str) -> Dict[str, str]:
        """Return the only finding of this name."""
        (finding,) = [f for f in self.findings if f["name"] == name]
        return finding

    def states(self) -> Dict[str, str]:
        return {finding["name"]: finding["state"] for finding in self.findings}


@pytest.fixture(autouse=True)
def database(refresherr: Refresherr) -> None:
    refresherr.make_database()


def examine(refresherr: Refresherr, *args: object) -> Said:
    result = refresherr("doctor", "--json", *args)
    assert not result.err, result.err
    assert API_KEY not in result.out
    assert KEY not in result.out
    answer = result.json
    failed = any(finding["state"] == "failed" for finding in answer["findings"])
    assert result.code == answer["exit_code"] == (3 if failed else 0)
    for finding in answer["findings"]:
        assert finding["advice"] or finding["state"] == "ok", finding
    return Said(result.code, answer["findings"], result.out)


# --- The installation ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("[scan]\nroots = {root}\n", 0, "{root}"),
        ("", 0, "roots"),
        ("[scan]\nroots = {root}, {root}/absent\n", 3, "{root}/absent"),
        ("[scan]\nroots = {root}\nmount_checks = {root}/no-mount\n", 3, "{root}/no-mount"),
        ("[scann]\nroots = {root}\n", 1, "scann"),
        ("[scan]\nstat_timeout = soon\n", 1, "stat_timeout"),
    ],
)
def test_doctor(
    refresherr: Refresherr, library: Library, write_config: Write, text: str, code: int, named: str
) -> None:
    library.season("Show", 1)
    write_config(text.replace("{root}", str(library.root)))
    named = named.replace("{root}", str(library.root))
    result = refresherr("doctor")
    assert result.code == code, result
    assert named in result.out
    assert "Traceback" not in result.err
    answer = refresherr("doctor", "--json").json
    assert answer["exit_code"] == code
    states = {finding["state"] for finding in answer["findings"]}
    assert ("failed" in states) is (code != 0)
    accused = [str(f) for f in answer["findings"] if f["state"] == "failed"]
    assert code == 0 or [line for line in accused if named in line]
    texts = " ".join(map(str, answer["findings"]))
    for word in (".".join(map(str, sys.version_info[:2])), str(refresherr.db_path)):
        assert word in texts


def test_rows_below_no_root(refresherr: Refresherr, library: Library, write_config: Write) -> None:
    """A library that has moved: named with the place and the cure; `db prune` is that cure."""
    library.season("tv/Show", 2)
    library.season("old tv/Show", 3)
    refresherr.scan(library.root)
    write_config(f"[scan]\nroots = {library.root}/tv\n")
    place = library.root / "old tv" / "Show" / "Season 01" / "old tv"
    said = examine(refresherr).of(f"directory {place}")
    assert (said["state"], said["detail"][:7]) == ("warning", "3 links")
    assert "db prune" in said["advice"]
    assert refresherr("db", "prune").code == 0
    assert f"directory {place}" not in examine(refresherr).states()
    assert examine(refresherr).of(f"root {library.root}/tv")["state"] == "ok"


def test_links_that_lead_to_a_folder(
    refresherr: Refresherr, library: Library, write_config: Write
) -> None:
    library.season("Show", 2)
    film = library.link("Film (2010)/Film (2010).mkv", "Film.2010.1080p/film.mkv")
    film.unlink()
    film.symlink_to(library.mount / "Film.2010.1080p")
    library.link("Other (2011)/Other (2011).mkv", "a file without a suffix")
    season = library.root / "Whole" / "Season 01"
    season.parent.mkdir()
    season.symlink_to(library.mount / "Film.2010.1080p")
    write_config(f"[scan]\nroots = {library.root}\n")
    assert refresherr.scan()["totals"]["ok"] == 5
    said = examine(refresherr)
    assert [name for name in said.states() if name.startswith("link ")] == [f"link {film}"]
    assert said.of(f"link {film}")["detail"] == "leads to a folder"
    assert said.of(f"link {film}")["state"] == "warning"


def test_doctor_with_a_database_that_cannot_be_opened(refresherr: Refresherr) -> None:
    refresherr.db_path.unlink()
    refresherr.db_path.mkdir()
    result = refresherr("doctor")
    assert result.code == 1
    assert str(refresherr.db_path) in result.out
    assert "Traceback" not in result.out + result.err


def test_what_it_prints(refresherr: Refresherr, library: Library, write_config: Write) -> None:
    root = library.root / "tv\x1b[31m\u202e"
    library.link(f"{root.name}/film.mkv")
    write_config(f"[cinesync]\nbase = {library.mount}\nroots = /absent\n")
    refresherr.env["SCAN_ROOTS"] = str(root)
    assert "\n        */30 * * * * " in refresherr("doctor").out
    refresherr("scan")
    lines = refresherr("doctor").out.splitlines()
    assert all(line.isprintable() for line in lines)
    for line in lines[:-1]:
        assert re.match(r"(ok|warning|failed) +\S|        \S", line), line
    accused = lines.index("failed  cinesync /absent: does not exist")
    assert lines[accused + 1].startswith("        -> ")
    assert re.fullmatch(r"\d+ ok, 0 warning, 1 failed", lines[-1])


# --- The clock and cron ----------------------------------------------------------------------


@pytest.mark.parametrize("column", ["ts", "started_utc", "finished_utc", ""])
def test_the_clock(refresherr: Refresherr, library: Library, column: str) -> None:
    refresherr.scan(library.root)
    assert examine(refresherr).of("clock")["state"] == "ok"
    future = time.time() + MONTH
    conn = sqlite3.connect(str(refresherr.db_path))
    with conn:
        if column == "ts":
            conn.execute("INSERT INTO events (ts) VALUES (?)", (int(future),))
        elif column:
            conn.execute(f"UPDATE runs SET {column} = ?", (program.format_time(future),))
    conn.close()
    clock = examine(refresherr).of("clock")
    assert clock["state"] == ("warning" if column else "ok")
    assert (program.format_time(future) in clock["detail"]) is bool(column)
    assert program.format_time(time.time())[:10] in clock["detail"]


def test_a_clock_that_was_never_set(refresherr: Refresherr, library: Library) -> None:
    refresherr("stats")
    conn = program.open_database(str(refresherr.db_path))
    for now, state in ((86400.0, "warning"), (time.time(), "ok")):
        assert next(program.examine_time(conn, now, "")).state == state
    conn.close()


def test_times_that_are_none(refresherr: Refresherr) -> None:
    refresherr("stats")
    conn = sqlite3.connect(str(refresherr.db_path))
    for ts in ("yesterday", -(10**18), 10**18):
        with conn:
            conn.execute("DELETE FROM events")
            conn.execute("INSERT INTO events (ts) VALUES (?)", (ts,))
        state = examine(refresherr).of("clock")["state"]
        assert state == ("warning" if ts == 10**18 else "ok")
    conn.close()


@pytest.mark.parametrize(("age", "state"), [(0, "ok"), (MONTH, "warning"), (None, "warning")])
def test_the_schedule(
    refresherr: Refresherr, library: Library, age: Optional[int], state: str
) -> None:
    if age is not None:
        refresherr.scan(library.root)
        started = program.format_time(time.time() - age)
        conn = sqlite3.connect(str(refresherr.db_path))
        with conn:
            conn.execute("UPDATE runs SET started_utc = ?", (started,))
            conn.execute(
                "INSERT INTO runs (command, started_utc) VALUES ('ingest', ?)",
                (program.utc_now(),),  # is no scan
            )
        conn.close()
    schedule = examine(refresherr).of("schedule")
    assert schedule["state"] == state
    assert "roots" in schedule["advice"] and not schedule["line"]
    refresherr.env["SCAN_ROOTS"] = str(library.root)
    assert examine(refresherr).of("schedule")["line"].endswith(" run --apply")
    refresherr("run")
    assert not examine(refresherr).of("schedule")["line"]


def test_a_refused_scan_is_a_finding(refresherr: Refresherr, library: Library) -> None:
    links = [library.link(f"Film {n}/film.mkv") for n in range(20)]
    refresherr.scan(library.root)
    assert "last scan" not in examine(refresherr).states()
    for link in links[:15]:
        target_of(link).unlink()
    assert refresherr("scan", library.root).code == 4
    finding = examine(refresherr).of("last scan")
    assert "15 links" in finding["detail"] and "of 20 there" in finding["detail"]
    assert "--accept" in finding["detail"] + finding["advice"]


def test_without_a_config_nothing_is_looked_for(
    refresherr: Refresherr, write_config: Callable[[str], Path]
) -> None:
    write_config("[scann]\n")
    command = [word for word in refresherr.command("doctor", "--json") if word != "--data-dir"]
    command.remove(str(refresherr.data_dir))
    done = subprocess.run(command, env=refresherr.env, stdout=-1, check=False)
    names = [finding["name"] for finding in json.loads(done.stdout)["findings"]]
    assert done.returncode == 1 and names == ["python", "sqlite", "https", "config"]


@pytest.mark.parametrize("configured", [True, False])
def test_the_line_for_cron_works(tmp_path: Path, configured: bool) -> None:
    folder = tmp_path / 'it\'s 100% "mine" $HOME'
    folder.mkdir()
    refresherr = Refresherr(folder)
    refresherr("stats")
    refresherr.env["SCAN_ROOTS"] = "/opt/media"
    words = [*refresherr.command()[:2], "doctor", "--json"]
    if configured:
        (folder / "re.ini").write_text(f"[refresherr]\ndata_dir = {refresherr.data_dir}\n")
        words += ["--config", "re.ini"]
    else:
        words += ["--data-dir", "data"]
    done = subprocess.run(words, cwd=folder, env=refresherr.env, stdout=-1, check=False)
    lines = re.findall(r'"line": "(\*.*)"', done.stdout.decode())
    line = lines[0].encode().decode("unicode_escape")
    assert line.startswith("*/30 * * * * ")
    assert line.endswith(" run --apply")
    assert ("--config" in line) is configured
    # As cron does it: an escaped % is itself, any other one a newline; the directory is another.
    command = re.sub(r"(?<!\\)%", "\n", line[len("*/30 * * * * ") : -len("run --apply")])
    command = command.replace("\\%", "%") + "db path"
    done = subprocess.run(["sh", "-c", command], cwd="/", env={}, stdout=-1, check=False)
    assert done.stdout.decode() == f"{refresherr.db_path}\n"


# --- Permissions -----------------------------------------------------------------------------

AS_NOBODY = """
import os, sys, refresherr
refresherr.main(sys.argv[1:])  # the interpreter may lie where only root can go: all the imports
sys.stdout.flush()
os.write(1, b"now as nobody\\n")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(refresherr.main(sys.argv[1:]))
"""


@pytest.fixture
def open_to_all(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Let everybody pass to tmp_path, and after the call write the database in it."""
    parents = [parent for parent in tmp_path.parents if str(parent).startswith("/tmp/")]
    modes = {parent: parent.stat().st_mode & 0o7777 for parent in parents}
    for parent in parents:
        parent.chmod(modes[parent] | 0o011)

    def release() -> None:
        tmp_path.chmod(0o755)
        for path in [tmp_path / "data", *(tmp_path / "data").iterdir()]:
            path.chmod(0o777)

    yield release
    for parent in parents:
        parent.chmod(modes[parent])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_links_that_this_user_cannot_replace(
    refresherr: Refresherr, library: Library, open_to_all: Callable[[], None], tmp_path: Path
) -> None:
    for show in ("Mine", "Sticky", "Theirs", "Gone"):
        library.season(show, 2)
    library.link("Theirs/broken.mkv", exists=False)
    (library.root / "Mine/Season 01").chmod(0o777)
    (library.root / "Sticky/Season 01").chmod(0o1777)
    refresherr.scan(library.root)
    for link in [*(library.root / "Gone/Season 01").iterdir()]:
        link.unlink()
    (library.root / "Gone/Season 01").rmdir()
    file = tmp_path / "re.ini"
    text = f"[scan]\nroots = {library.root}\n"
    open_to_all()
    for more in ("", f"[cinesync]\nbase = {library.mount}\n"):
        file.write_text(text + more)
        command = [sys.executable, "-c", AS_NOBODY, "--data-dir", str(refresherr.data_dir)]
        done = subprocess.run(
            [*command, "--config", str(file), "doctor"],
            cwd=PROJECT,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        as_root, as_nobody = done.stdout.split("now as nobody\n")
        if not more:  # nothing ever changes a link
            assert "permissions" not in done.stdout
            continue
        assert "ok      permissions: links can be replaced (4 places tried)" in as_root
        places = f"{library.root}/Theirs: it belongs to user 0, this is user 65534"
        warning = f"warning permissions: links cannot be replaced in 3 of 4 places: {places}\n"
        assert warning in as_nobody, done


def test_a_read_only_library(
    refresherr: Refresherr, tmpfs_mount: Any, tmp_path: Path, write_config: Write
) -> None:
    library = Library(tmp_path / "mount")
    library.season("Show", 1)
    refresherr.scan(library.root)
    write_config(f"[scan]\nroots = {library.root}\n[cinesync]\nbase = {tmp_path}/none\n")
    assert examine(refresherr).of("permissions")["state"] == "ok"
    remount = ["mount", "-o", "remount,ro", str(tmp_path / "mount")]
    if subprocess.run(remount, check=False).returncode:
        pytest.skip("cannot remount")
    finding = examine(refresherr).of("permissions")
    assert finding["state"] == "warning"
    assert finding["detail"].endswith("read-only")


@pytest.mark.skipif(bool(fuse_available()), reason=fuse_available() or "-")
def test_a_directory_of_links_that_hangs(
    refresherr: Refresherr, library: Library, write_config: Write, tmp_path: Path
) -> None:
    library.season("Show", 1)
    inner, source = library.root / "Inner", tmp_path / "source"
    inner.mkdir()
    source.mkdir()
    (source / "link.mkv").symlink_to(library.root / "Show")
    write_config(
        f"[scan]\nroots = {library.root}\nstat_timeout = 1s\n[cinesync]\nbase = {tmp_path}/none\n"
    )
    cloud = FuseMount(inner, source, timeout=0)
    cloud.mount()
    try:
        refresherr.scan()
        cloud.hang()
        started = time.monotonic()
        finding = examine(refresherr).of("permissions")
        assert time.monotonic() - started < 15
        assert finding["state"] == "warning"
        assert f"in 1 of 2 places: {inner}: " in finding["detail"]
    finally:
        cloud.close()


def test_the_directories_of_broken_links_come_first(
    refresherr: Refresherr, library: Library
) -> None:
    for number in range(60):
        library.link(f"{number:02}/film.mkv", exists=number != 57)
    library.link("elsewhere/film.mkv", exists=False)
    refresherr.scan(library.root)
    conn = program.open_database(str(refresherr.db_path))
    roots = [f"{library.root}/{number:02}" for number in range(60)]
    folders = program.sample_folders(conn, roots)
    conn.close()
    assert folders[0] == roots[57]
    assert len(folders) == len(set(folders)) == program.SAMPLE
    assert set(folders) <= set(roots)


# --- Sonarr and Radarr: are their files our links? ---------------------------------------------


class House(NamedTuple):
    """A library of links that a Sonarr and a Radarr call something else."""

    refresherr: Refresherr
    library: Library
    sonarr: FakeSonarr
    radarr: FakeRadarr
    config: Path

    def write(self, sonarr: str = "", radarr: str = "", more: str = "") -> None:
        sections = [f"[scan]\nroots = {self.library.root}\n{more}\n"]
        for name, server, path_map in (
            ("sonarr tv", self.sonarr, sonarr),
            ("radarr films", self.radarr, radarr),
        ):
            section = f"[{name}]\nurl = {server.url}\napi_key = {server.api_key}\n{path_map}\n"
            sections.append(section)
        self.config.write_text("".join(sections))

    def fill(self, shows: int = 3, films: int = 3) -> None:
        """Give the servers their files, and each file its link."""
        for number in range(shows):
            show = self.sonarr.add_series(f"Show {number}", 2000 + number)
            for episode in (1, 2):
                self.link(self.sonarr, self.sonarr.add_file(
                    show, f"Season 01/S01E{episode:02}.mkv", [(1, episode)]
                ))  # fmt: skip
        for number in range(films):
            film = self.radarr.add_movie(f"Film {number}", file_name="film.mkv")
            self.link(self.radarr, self.radarr.units()[film]["movieFileId"])

    def link(self, server: FakeArr, number: int) -> None:
        link = server.link_of(number)
        link.parent.mkdir(parents=True, exist_ok=True)
        goal = self.library.mount / f"{server.app}-{number}.mkv"
        goal.write_bytes(b"video")
        link.symlink_to(goal)


@pytest.fixture
def house(refresherr: Refresherr, library: Library, write_config: Write) -> Iterator[House]:
    tv, films = library.root / "Серии, tv", library.root / "films"
    with FakeSonarr(tv, server_root="/tv") as sonarr, FakeRadarr(films, server_root="/films") as r:
        house = House(refresherr, library, sonarr, r, write_config(""))
        house.write()
        yield house


def test_paths_that_are_right(house: House) -> None:
    house.fill(shows=30, films=90)
    house.write(
        f"path_map = {house.sonarr.root} => /tv", f"path_map = {house.radarr.root} => /films"
    )
    house.refresherr.scan()
    house.sonarr.clear_requests()
    said = examine(house.refresherr)
    for name in ("sonarr_tv", "radarr_films"):
        assert said.of(name)["state"] == "ok"
    for name, tried in (("sonarr_tv", 12), ("radarr_films", 18)):
        detail = f"{tried} of {tried} files tried are known links"
        assert said.of(f"paths of {name}") == {
            "name": f"paths of {name}", "state": "ok", "detail": detail, "advice": "", "line": "",
        }  # fmt: skip
    assert len(house.sonarr.requests) <= 10
    asked = [request.query["seriesId"] for request in house.sonarr.requests if request.query]
    assert len(asked) > 3
    assert max(int(number[0]) for number in asked) > 20  # from all over the library
    assert not house.sonarr.changes()


@pytest.mark.parametrize("wrong", ["", "path_map = {root} => /tvv", "path_map = /tv => /x"])
def test_a_path_map_that_is_proposed_is_right(house: House, wrong: str) -> None:
    house.fill()
    house.library.link("Other/Season 01/S01E01.mkv")  # of the same name
    house.refresherr.scan()
    house.write(sonarr=wrong.format(root=house.sonarr.root))
    said = examine(house.refresherr)
    lines = {}
    for name, section in (("sonarr_tv", "[sonarr tv]"), ("radarr_films", "[radarr films]")):
        finding = said.of(f"paths of {name}")
        assert finding["state"] == "failed"
        assert section in finding["advice"]
        lines[name.partition("_")[0]] = finding["line"]
    assert lines["sonarr"] == f"path_map = {house.sonarr.root} => /tv"
    assert lines["radarr"] == f"path_map = {house.radarr.root} => /films"
    house.write(**lines)
    assert examine(house.refresherr).code == 0
    ingested = house.refresherr("ingest", "--json").json["instances"]
    assert [(one["linked"], one["files"]) for one in ingested] == [(3, 3), (6, 6)]


def test_a_map_for_each_root_folder(house: House) -> None:
    anime = house.library.root / "anime"
    house.fill()
    house.sonarr.roots["/tv 2"] = anime
    show = house.sonarr.add_series("Anime", 2010, path="/tv 2/Anime (2010)")
    file = house.sonarr.add_file(show, "Season 01/S01E01.mkv", [(1, 1)])
    house.link(house.sonarr, file)
    house.refresherr.scan()
    line = examine(house.refresherr).of("paths of sonarr_tv")["line"]
    assert line == f"path_map = {house.sonarr.root} => /tv, {anime} => /tv 2"
    house.write(sonarr=line)
    assert examine(house.refresherr).of("paths of sonarr_tv")["detail"].startswith("7 of 7 ")


def test_decoys(house: House) -> None:
    for episode in (1, 2):  # of the same names, and scanned first
        house.library.link(f"Else/Season 01/S01E{episode:02}.mkv")
    house.refresherr.scan()
    house.fill(shows=1)
    house.refresherr.scan()
    house.sonarr.roots["/uhd"] = house.library.mount / "uhd"  # the same again, not scanned
    show = house.sonarr.add_series("Show 0", 2000, path="/uhd/Show 0 (2000)")
    house.sonarr.add_file(show, "Season 01/S01E01.mkv", [(1, 1)])
    line = examine(house.refresherr).of("paths of sonarr_tv")["line"]
    assert line == f"path_map = {house.sonarr.root} => /tv"


@pytest.mark.parametrize("relative", [False, True])
def test_links_to_a_servers_files(house: House, relative: bool) -> None:
    house.fill(films=0)
    for number, file in enumerate(house.sonarr.files):
        link, goal = (
            house.sonarr.link_of(file),
            house.library.mount / house.sonarr.path_of(file)[1:],
        )
        goal.parent.mkdir(parents=True, exist_ok=True)
        goal.write_bytes(b"video")
        link.unlink()
        new = house.library.root / f"{number}.mkv"
        new.symlink_to(os.path.relpath(goal, new.parent) if relative else goal)
    house.refresherr.scan()
    finding = examine(house.refresherr).of("paths of sonarr_tv")
    assert finding["line"] == f"path_map = {house.library.mount}/tv => /tv"
    house.write(sonarr=finding["line"])
    said = examine(house.refresherr)
    assert said.of("paths of sonarr_tv")["detail"] == "6 of 6 files tried are known links"
    assert said.of("paths of radarr_films")["state"] == "ok"  # it has none


def test_a_library_that_lies_elsewhere(house: House) -> None:
    house.fill()
    house.library.link("Else/Season 01/S01E01.mkv")
    for kind in (house.sonarr, house.radarr):
        for file in kind.files:
            kind.link_of(file).unlink()
    finding = examine(house.refresherr).of("paths of sonarr_tv")
    assert finding["state"] == "warning"
    assert "no links are known" in finding["detail"]
    assert not [r for r in house.sonarr.requests if r.path.endswith("/series")]
    house.refresherr.scan()
    said = examine(house.refresherr)
    for name, path in (("sonarr_tv", "/tv/Show 0"), ("radarr_films", "/films/Film 0")):
        finding = said.of(f"paths of {name}")
        assert finding["state"] == "warning"
        assert path in finding["detail"]
        assert not finding["line"]


@pytest.mark.parametrize("name", ["tv\nx", "tv => x", "a, /b", os.fsdecode(b"tv\xff"), "tv "])
def test_a_map_that_no_config_can_hold_is_not_proposed(
    refresherr: Refresherr, write_config: Write, library: Library, name: str
) -> None:
    with FakeSonarr(library.root / name, server_root="/tv") as sonarr:
        show = sonarr.add_series("Show", 2000)
        file = sonarr.add_file(show, "Season 01/S01E01.mkv", [(1, 1)])
        link = sonarr.link_of(file)
        link.parent.mkdir(parents=True)
        link.symlink_to(library.mount)
        refresherr.scan(library.root)
        write_config(f"[sonarr tv]\nurl = {sonarr.url}\napi_key = {API_KEY}\n")
        finding = examine(refresherr).of("paths of sonarr_tv")
        assert finding["state"] == "warning"
        assert not finding["line"]


def test_a_hundred_thousand_links(house: House) -> None:
    house.fill()
    house.refresherr.scan()
    conn = sqlite3.connect(str(house.refresherr.db_path))
    rows = ((f"/x/Show {n}/Season 01/S01E01.mkv", f"/y/{n}/film.mkv", "ok") for n in range(100000))
    with conn:
        conn.executemany("INSERT INTO symlinks (path, last_target, status) VALUES (?, ?, ?)", rows)
    conn.close()
    started = time.monotonic()
    lines = [finding["line"] for finding in examine(house.refresherr).findings]
    assert time.monotonic() - started < 30
    assert f"path_map = {house.sonarr.root} => /tv" in lines


# --- The relay, Plex, Jellyfin and Emby ------------------------------------------------------


@pytest.mark.parametrize("base", ["url", "find_url"])
def test_the_relay_is_asked_nothing(refresherr: Refresherr, write_config: Write, base: str) -> None:
    with FakeRelay(prefix="relay") as relay:
        write_config(f"[relay]\nbase = {getattr(relay, base)}\ntoken = {KEY}\n")
        assert examine(refresherr).of("relay")["state"] == "ok"
        assert not relay.finds
        assert [request.target for request in relay.requests] == ["/relay"]
        relay.script(status=502)
        assert examine(refresherr).of("relay")["state"] == "failed"
    finding = examine(refresherr).of("relay")
    assert finding["state"] == "failed"
    assert "[relay]" in finding["advice"]


class FakePlex(FakeServer):
    """Plex, Jellyfin and Emby at once; `folders` are those of Plex' libraries."""

    folders: Sequence[str] = ("/data/tv", "/data/films")

    def answer(self, request: Request) -> Reply:
        headers = request.headers
        if request.path == "/identity":
            return as_json({"MediaContainer": {"claimed": True, "version": "1.41.3.9314"}})
        if request.path == "/library/sections" and headers.get("x-plex-token") == KEY:
            sections = [{"key": "1", "Location": [{"id": 1, "path": p}]} for p in self.folders]
            return as_json({"MediaContainer": {"size": len(sections), "Directory": sections}})
        jellyfin = headers.get("authorization") == f'MediaBrowser Token="{KEY}"'
        if request.path == "/System/Info" and (jellyfin or headers.get("x-emby-token") == KEY):
            return as_json({"ServerName": "nas", "Version": "10.10.3" if jellyfin else "4.8.10.0"})
        return Reply(401)


def media_config(server: FakeServer, key: str = KEY, more: str = "") -> str:
    lines = [f"[plex]\nurl = {server.url}\ntoken = {key}\n{more}"]
    lines += [f"[{name}]\nurl = {server.url}\napi_key = {key}" for name in ("jellyfin", "emby")]
    return "\n".join(lines) + "\n"


def test_media_servers(refresherr: Refresherr, write_config: Write) -> None:
    versions = {"plex": "1.41.3.9314", "jellyfin": "10.10.3", "emby": "4.8.10.0"}
    with FakePlex() as server:
        write_config(media_config(server))
        said = examine(refresherr)
        for name, version in versions.items():
            assert said.of(name)["state"] == "ok"
            assert version in said.of(name)["detail"]
        assert all(KEY not in request.target for request in server.requests)
        write_config(media_config(server, "another"))
        said = examine(refresherr)
        for name in versions:
            (finding,) = [f for f in said.findings if f["state"] == "failed" and f["name"] == name]
            assert "refused" in finding["detail"]
            assert f"[{name}]" in finding["advice"]
        assert "another" not in said.text
        write_config(media_config(server))
        echo = b'{"message": "who is %s?"}' % KEY.encode()
        server.script(status=500, body=echo, times=None)
        assert examine(refresherr).text.count("who is ***?") == 3
        for sickness in ("html", "null"):
            server.scripts.clear()
            server.sick(sickness, times=None)
            said = examine(refresherr)
            assert {said.of(name)["state"] for name in versions} == {"failed"}
    assert {examine(refresherr).of(name)["state"] for name in versions} == {"failed"}


# --- CineSync --------------------------------------------------------------------------------


def test_the_directories_of_cinesync(
    refresherr: Refresherr, library: Library, write_config: Write, tmp_path: Path
) -> None:
    for name in ("base", "allowed"):
        (tmp_path / name).mkdir()
    write_config(
        f"[scan]\nroots = {library.root}\n[cinesync]\nbase = {tmp_path}/base\n"
        f"roots = {library.root}, {tmp_path}/root\nallowed_targets = {tmp_path}/allowed\n"
    )
    states = examine(refresherr).states()
    assert states[f"root {library.root}"] == states[f"cinesync {tmp_path}/base"] == "ok"
    assert states[f"cinesync {tmp_path}/allowed"] == "ok"
    assert states[f"cinesync {tmp_path}/root"] == "failed"
