"""Relinking to CineSync's copies, and undo: real trees, real links, real mounts, real kills."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
from cinesync_library import CineSyncLibrary, Part
from fuse_fs import FuseMount, fuse_available, tmpfs, tmpfs_available

import refresherr as program

SHOW = Part("Harbour Lights", 2001, 1, (1,))
MOVIE = Part("Paper Comet", 1999)


class Stage:
    """A library beside CineSync's tree, and the program on it, run in this very process."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.library = CineSyncLibrary(folder, **options)
        self.data = folder / "data"
        self.options: List[object] = ["--min-age", "0", "--patience", "0", "--limit", "10000"]
        self.config = ""

    def argv(self, *args: object) -> List[str]:
        head = ["--data-dir", str(self.data), "--json"]
        if self.config:
            (self.folder / "refresherr.ini").write_text(self.config)
            head += ["--config", str(self.folder / "refresherr.ini")]
        return [*head, *map(str, args)]

    def run(self, *args: object) -> Dict[str, Any]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            code = program.main(self.argv(*args))
        result: Dict[str, Any] = json.loads(out.getvalue())
        assert result["exit_code"] == code, result
        assert str(result.get("message")).find("internal error") < 0, result
        return result

    def scan(self) -> Dict[str, Any]:
        """Scan twice: what the guard of the first holds is confirmed by the second."""
        self.run("scan", *self.roots())
        return self.run("scan", "--accept-breakage", *self.roots())

    def roots(self) -> List[Path]:
        witness = self.folder / "witness"  # good links that speak for the places of broken ones
        return [self.library.media, witness] if witness.exists() else [self.library.media]

    def cinesync_args(self, *args: object) -> List[object]:
        library = self.library
        places = ["--base", library.base, "--root", library.media, "--allow-target", library.mount]
        return ["cinesync", *self.options, *places, *args]

    def cinesync(self, *args: object) -> Dict[str, Any]:
        return self.run(*self.cinesync_args("--apply", *args))

    def query(self, sql: str, *values: object) -> List[Any]:
        with contextlib.closing(sqlite3.connect(str(self.data / "symlinks.db"))) as conn:
            return conn.execute(sql, values).fetchall()

    def broken(self, part: Part = SHOW, height: int = 1080, name: str = "") -> str:
        """Make a broken link beside a good one of the same release."""
        path = self.library.library_link(part, height, broken=True, name=name)
        neighbour = Path(os.readlink(path)).with_name("neighbour.mkv")
        with contextlib.suppress(OSError):  # the mount may be read-only
            neighbour.touch()
        witness = self.folder / "witness" / f"{len(self.texts())}.mkv"
        witness.parent.mkdir(exist_ok=True)
        witness.symlink_to(neighbour)
        return path

    def texts(self) -> Dict[str, str]:
        """Return every link of the library, stray temporary ones included."""
        found, todo = {}, [str(self.library.media)]
        while todo:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:  # os.walk would look at the targets, and hang like them
                    if entry.is_symlink():
                        with contextlib.suppress(FileNotFoundError):  # a temporary one
                            found[entry.path] = os.readlink(entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
        return found


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def reason(result: Dict[str, Any], path: str) -> str:
    (item,) = [item for item in result["items"] if item["path"] == path]
    assert item["result"] in ("skipped", "error"), item
    return str(item["reason"])


# What it does


def test_a_broken_link_gets_the_file_behind_cinesyncs_copy(stage: Stage) -> None:
    path, movie = stage.broken(), stage.broken(MOVIE)
    copy, other = stage.library.copy(SHOW, 1080), stage.library.copy(MOVIE, 1080, raw=False)
    before = stage.texts()
    stage.scan()
    preview = stage.run(*stage.cinesync_args())
    assert (preview["applied"], preview["run_id"], preview["replaced"]) == (False, None, 0)
    assert {item["result"] for item in preview["items"]} == {"would replace"}
    assert stage.texts() == before
    assert stage.query("SELECT count(*) FROM cinesync_items") == [(0,)]
    assert stage.query("SELECT count(*) FROM runs WHERE command = 'cinesync'") == [(0,)]

    result = stage.cinesync()
    real = os.readlink(copy)
    (item,) = [item for item in result["items"] if item["path"] == path]
    assert item == {
        "path": path, "old_target": before[path], "new_target": real, "via": str(copy),
        "result": "replaced", "reason": "",
    }  # fmt: skip
    assert stage.texts() == {path: real, movie: os.readlink(other)}
    assert not stage.library.wrong()
    names = ("indexed", "checked_broken", "candidate_found", "resolved_target_ok", "replaced")
    assert [result[name] for name in names] == [2, 2, 2, 2, 2]
    assert (result["skipped"], result["errors"], result["exit_code"]) == (0, 0, 0)

    select = "SELECT path, status, last_status, broken_since_utc FROM symlinks WHERE path LIKE ?"
    rows = stage.query(select, f"{stage.library.media}%")
    assert sorted(rows) == sorted((p, "ok", "ok", None) for p in (path, movie))
    events = stage.query("SELECT action, status FROM events WHERE path = ? AND id > 2", path)
    assert events == [("relinked", "ok"), ("recovered", "ok")]
    assert stage.query("SELECT DISTINCT run_id, state FROM link_changes") == [
        (result["run_id"], "done")
    ]
    run = stage.query(
        "SELECT run_id, dry_run, repair_roots, cinesync_base, allowed_prefixes, indexed_count, "
        "checked_broken, candidate_found, resolved_target_ok, replaced, skipped, errors, "
        "finished_utc >= started_utc FROM cinesync_runs"
    )
    library = stage.library
    places = tuple(map(str, (library.media, library.base, library.mount)))
    assert run == [(result["run_id"], 0, *places, 2, 2, 2, 2, 2, 0, 0, 1)]
    (stats,) = [stage.run("stats")["last_cinesync"]]
    assert (stats["replaced"], stats["status"]) == (2, "ok")
    assert stage.scan()["changes"] == {
        "new": 0, "newly_broken": 0, "recovered": 0, "vanished": 0,
    }  # fmt: skip
    assert stage.run(*stage.cinesync_args("--apply"))["checked_broken"] == 0


@pytest.mark.parametrize("top", ["CineSync", ""])
def test_no_wrong_match_in_a_whole_library(tmp_path: Path, top: str) -> None:
    stage = Stage(tmp_path, seed=7 + len(top), top=top)
    stage.library.fill(2000 if top else 600, broken_every=6, items=1000)
    before = stage.texts()
    stage.scan()
    result = stage.cinesync()
    done = {item["path"] for item in result["items"] if item["result"] == "replaced"}
    assert stage.library.wrong() == []
    assert done == stage.library.repairable
    assert len(done) > 50
    changed = {path for path, text in stage.texts().items() if text != before[path]}
    assert changed == done
    undone = stage.run("undo", "--apply")
    assert (undone["restored"], undone["skipped"], undone["exit_code"]) == (len(done), 0, 0)
    assert stage.texts() == before
    assert stage.scan()["changes"]["newly_broken"] == 0  # and the guard keeps still


# The match, by tables

Wanted = Tuple[str, Sequence[str], Optional[str]]
EPISODE = "/Show (2001)/Season 01/Show - S01E01 1080p.mkv"


@pytest.mark.parametrize(
    ("wanted", "copies", "found"),
    [
        (EPISODE, ["/Shows/Show (2001)/Season 1/Show.S01E01.1080p.mkv"], 1),
        (EPISODE, ["/Shows/FullHD/Show (2001) {tmdb-5}/Season 01/x.S01E01.mkv"], 1),
        (EPISODE, ["/Shows/Show (2002)/Season 1/Show.S01E01.mkv"], "no copy"),
        (EPISODE, ["/Shows/Show (2001)/Season 1/Show.S01E02.mkv"], "not this episode"),
        (EPISODE, ["/Shows/Show (2001)/Season 2/Show.S02E01.mkv"], "not this episode"),
        (EPISODE, ["/Movies/Show (2001)/Show (2001).mkv"], "no copy"),
        (EPISODE, ["/Shows/Show (2001)/Season 1/Show.S01E01E02.mkv"], "not this episode"),
        # two works of one title and year: their ids tell that they are two
        (EPISODE, ["/Shows/Show (2001) {tmdb-1}/Season 1/S01E01.mkv",
            "/Shows/Show (2001) {tmdb-2}/Season 1/S01E02.mkv"], "cannot tell"),
        # an id outweighs the title, and contradicts it
        ("/Show (2001) {tvdb-7}/Season 1/S01E01.mkv",
            ["/Shows/Die Show (2001) {tvdb-7}/Season 1/S01E01.mkv"], 1),
        ("/Show (2001) {tvdb-7}/Season 1/S01E01.mkv",
            ["/Shows/Show (2001) {tvdb-8}/Season 1/S01E01.mkv"], "no copy"),
        ("/Show (2001) {tvdb-7}/Season 1/S01E01.mkv",
            ["/Shows/Show (2021) {tvdb-7}/Season 1/S01E01.mkv"], "no copy"),
        ("/Show (2001) {tvdb-7}/Season 1/S01E01.mkv",
            ["/Shows/Show (2001) {tmdb-8}/Season 1/S01E01.mkv"], 1),
        # no year: only with a common id
        ("/Show/Season 1/S01E01.mkv", ["/Shows/Show (2001)/Season 1/S01E01.mkv"], "no copy"),
        ("/Show {tvdb-7}/Season 1/S01E01.mkv",
            ["/Shows/Show (2001) {tvdb-7}/Season 1/S01E01.mkv"], 1),
        (EPISODE, ["/Shows/Show/Season 1/S01E01.mkv"], "no copy"),
        ("/Film (2001)/Film.mkv", ["/Movies/Film/Film.1080p.mkv"], "no copy"),
        ("/Film/Film.1080p.mkv", ["/Movies/Film (2001)/Film.mkv"], "no copy"),
        # specials, dailies, several episodes
        ("/Show (2001)/Specials/Show - S00E03.mkv",
            ["/Shows/Show (2001)/Season 0/Show.S00E03.mkv"], 1),
        ("/Show (2001)/Season 2024/Show - 2024-01-05 - x.mkv",
            ["/Shows/Show (2001)/Season 7/Show.2024.01.05.1080p.mkv",
             "/Shows/Show (2001)/Season 7/Show.2024.01.06.1080p.mkv"], 1),
        ("/Show (2001)/Season 1/Show - S01E01-E02.mkv",
            ["/Shows/Show (2001)/Season 1/Show.S01E01E02.mkv"], 1),
        ("/Show (2001)/Season 1/Show - 05.mkv",
            ["/Shows/Show (2001)/Season 1/[Group] Show - 05 [1080p].mkv"], 1),
        ("/Show (2001)/Season 1/Show - 05.mkv",
            ["/Shows/Show (2001)/Season 1/Show II - 05.mkv"], "not this episode"),
        ("/Show (2001)/Season 1/Show - 05.mkv",
            ["/Shows/Show (2001)/Season 2/Show - 05.mkv"], "not this episode"),
        # traps
        (EPISODE, ["/Shows/Show (2001)/Season 1/Extras/Show - S01E01.mkv"], None),
        ("/Film (2001)/Film.mkv", ["/Movies/Film (2001)/Extras/Film (2001).mkv",
            "/Movies/Film (2001)/Film (2001)-trailer.mkv"], "no copy"),
        ("/Film (2001)/Film.mkv", ["/Movies/Film (2001)/Film (2001) cd1.mkv",
            "/Movies/Film (2001)/Film (2001) - part2.mkv"], "no copy"),
        # the collection has the id of some movie, the deepest one counts
        ("/Film Two (2004) {tmdb-22}/x.mkv", [
            "/Movie Collections/Film {tmdb-22}/Film (2001) {tmdb-11}/Film.mkv"], "no copy"),
        ("/Film Two (2004) {tmdb-22}/x.mkv", [
            "/Movie Collections/Film {tmdb-22}/Film (2001)/Film.mkv"], "no copy"),
    ],
)  # fmt: skip
def test_match(wanted: str, copies: Sequence[str], found: Any) -> None:
    items = [program.parse_work(path)._replace(path=path) for path in copies]
    matched, why = program.match_work(program.parse_work(wanted), items)
    if isinstance(found, int):
        assert (len(matched), why) == (found, "")
    else:
        assert not matched
        assert (found or "") in why


@pytest.mark.parametrize(
    ("own", "found", "fits"),
    [(1080, 1080, 1), (1080, 720, 1), (720, 1080, 1), (1080, 2160, 0), (720, 480, 0), (0, 2160, 0),
     (0, 480, 1), (480, 576, 1), (480, 1080, 1), (480, 2160, 0), (2160, 1080, 1), (2160, 480, 0),
     (2160, 2160, 1), (1080, 0, 1), (0, 0, 1)],
)  # fmt: skip
def test_resolutions(own: int, found: int, fits: int) -> None:
    assert program.is_fit(own, found) == bool(fits)


def test_the_own_resolution_then_the_nearest(stage: Stage) -> None:
    path = stage.broken(height=1080)
    for height in (480, 720, 2160):
        stage.library.copy(SHOW, height, raw=False, level=f"level {height}")
    stage.scan()
    assert "720p" in stage.cinesync()["items"][0]["new_target"]
    stage.run("undo", "--apply")
    stage.library.copy(SHOW, 1080)
    lost = os.readlink(path)  # what was taken back is left alone until the link changes
    os.unlink(path)
    os.symlink(os.path.join(os.path.dirname(lost), f"again.{os.path.basename(lost)}"), path)
    stage.scan()
    again = stage.cinesync()
    assert "1080p" in again["items"][0]["new_target"]
    assert path in stage.texts()


@pytest.mark.parametrize(("own", "copy"), [(1080, 480), (1080, 2160), (480, 2160)])
def test_another_resolution_only_when_asked_for(stage: Stage, own: int, copy: int) -> None:
    path = stage.broken(MOVIE, own)
    stage.library.copy(MOVIE, copy, raw=False)
    stage.scan()
    result = stage.cinesync()
    assert "--any-resolution" in reason(result, path)
    assert (result["candidate_found"], result["resolved_target_ok"]) == (1, 0)
    assert stage.cinesync("--any-resolution")["replaced"] == 1


def test_the_files_own_name_outweighs_cinesyncs(stage: Stage) -> None:
    """CineSync's names lack the second episode and may lack the resolution: the file tells."""
    double = Part("Harbour Lights", 2001, 1, (1, 2))
    single, both = stage.broken(), stage.broken(double)
    stage.library.copy(double, 1080, raw=False)  # named S01E01
    high = stage.library.file("a/Harbour.Lights.S01E01.2160p.mkv", SHOW, 2160)
    stage.library.item(Path("Shows/Harbour Lights (2001)/Season 1/Harbour - S01E01.mkv"), high)
    stage.scan()
    result = stage.cinesync()
    assert result["replaced"] == 1
    assert not stage.library.wrong()
    assert reason(result, single)
    assert "S01E01E02" in os.readlink(both)


def test_a_series_without_year_beside_a_namesake_stays(stage: Stage) -> None:
    for folder in ("Show", "Show (2004)"):
        stage.broken(SHOW, name=f"{folder}/Season 01/Show - S01E01.mkv")
    for year in (2004,):
        stage.library.copy(Part("Show", year, 1, (1,)), 1080)
    stage.scan()
    result = stage.cinesync()
    assert [item["path"].split("/")[-3] for item in result["items"] if not item["reason"]] == [
        "Show (2004)"
    ]


def test_the_servers_ids_tell_which_series_is_meant(stage: Stage) -> None:
    path = stage.broken(SHOW, name="Show/Season 01/Show - S01E01.mkv")
    for year, tag in ((1978, " {tvdb-71}"), (2004, " {tvdb-73}")):
        stage.library.copy(Part("Show", year, 1, (1,)), 1080, tag)
    stage.scan()
    assert "no copy" in reason(stage.cinesync(), path)
    with contextlib.closing(sqlite3.connect(str(stage.data / "symlinks.db"))) as conn, conn:
        conn.execute("INSERT INTO series (instance, sonarr_id, tvdb_id) VALUES ('s', 1, 73)")
        conn.execute(
            "INSERT INTO episode_files (instance, sonarr_series_id, symlink_path) "
            "VALUES ('s', 1, ?)",
            (path,),
        )
    assert "2004" in stage.cinesync()["items"][0]["new_target"]


# What it must not do


def test_what_is_not_broken_long_enough_waits(stage: Stage) -> None:
    path = stage.broken()
    stage.library.copy(SHOW, 1080)
    stage.scan()
    assert "less than" in reason(stage.cinesync("--min-age", "1h"), path)
    assert stage.cinesync("--min-age", "0")["replaced"] == 1


def test_a_link_that_works_again_or_changed_or_went_is_left_alone(stage: Stage) -> None:
    parts = [Part("Harbour Lights", 2001, 1, (n,)) for n in range(1, 4)]
    back, changed, gone = map(stage.broken, parts)
    for part in parts:
        stage.library.copy(part, 1080)
    stage.scan()
    Path(os.readlink(back)).write_bytes(b"video")
    os.unlink(changed)
    os.symlink("/nowhere/else.mkv", changed)
    os.unlink(gone)
    before = stage.texts()
    result = stage.cinesync()
    assert result["replaced"] == 0
    assert stage.texts() == before
    assert reason(result, back) == "it works again"
    assert reason(result, gone)
    assert reason(result, changed) == "it points elsewhere since the last scan"


@pytest.mark.parametrize(
    "trap", ["gone", "directory", "pipe", "outside", "outside by a link", "subtitle", "loop"]
)
def test_only_a_readable_video_below_the_allowed_targets_will_do(stage: Stage, trap: str) -> None:
    path = stage.broken()
    copy = stage.library.copy(SHOW, 1080)
    real = Path(os.readlink(copy))
    outside = stage.folder / "outside" / "Harbour.Lights.S01E01.1080p.mkv"
    outside.parent.mkdir()
    real.unlink()
    if trap == "directory":
        real.mkdir()
    elif trap == "pipe":
        os.mkfifo(real)
    elif trap.startswith("outside"):
        outside.write_bytes(b"video")
        real.symlink_to(outside)
        if trap == "outside":
            copy.unlink()
            copy.symlink_to(outside)
    elif trap == "subtitle":
        real.with_suffix(".srt").write_bytes(b"text")
        real.symlink_to(real.with_suffix(".srt"))
    elif trap == "loop":
        real.symlink_to(real)
    before = stage.texts()
    stage.scan()
    result = stage.cinesync()
    assert reason(result, path)
    assert (result["replaced"], result["resolved_target_ok"]) == (0, 0)
    assert stage.texts() == before


def test_a_chain_of_links_ends_at_the_real_file(stage: Stage) -> None:
    path = stage.broken()
    copy = stage.library.copy(SHOW, 1080)
    real = os.readlink(copy)
    hop = stage.folder / "hop.mkv"
    hop.symlink_to(real)
    copy.unlink()
    copy.symlink_to(os.path.relpath(hop, copy.parent))
    stage.options += ["--allow-target", stage.library.mount]
    stage.scan()
    assert stage.cinesync()["replaced"] == 1
    assert os.readlink(path) == real


@pytest.mark.parametrize("state", ["missing", "empty", "no video", "file"])
def test_a_base_without_a_library_is_refused(stage: Stage, state: str) -> None:
    stage.broken()
    base = stage.library.base
    base.rmdir()
    if state == "file":
        base.touch()
    elif state != "missing":
        base.mkdir()
    if state == "no video":
        (base / "Shows").mkdir()
        (base / "Shows" / "subtitle.srt").touch()
    stage.scan()
    result = stage.cinesync("--accept-shrink")
    assert (result["exit_code"], result["status"], result["replaced"]) == (4, "refused", 0)
    assert str(base) in result["message"]
    assert stage.query("SELECT indexed_count FROM cinesync_runs") == [(None,)]


@pytest.mark.parametrize("how", ["flag", "config", "link", "reverse"])
def test_a_base_inside_a_root_is_a_configuration_error(stage: Stage, how: str) -> None:
    library = stage.library
    stage.scan()
    inside = library.media / "cinesync"
    inside.mkdir()
    base, root = inside, library.media
    if how == "link":
        base = stage.folder / "elsewhere"
        base.symlink_to(inside)
    elif how == "reverse":
        base, root = root, inside
    args: List[object] = ["--base", base, "--root", root]
    if how == "config":
        stage.config, args = f"[cinesync]\nbase = {base}\nroots = {root}\n", []
    result = stage.run("cinesync", *args, "--allow-target", library.mount, "--apply")
    assert result["exit_code"] == 2
    assert "own links" in result["message"]


def test_what_must_be_said_is_asked_for(stage: Stage) -> None:
    result = stage.run("cinesync-repair", "--base", stage.library.base, "--root", "/tv")
    assert (result["command"], result["exit_code"]) == ("cinesync", 2)
    assert "--allow-target" in result["message"]


@pytest.mark.parametrize("uid", [12345])
def test_the_owner_stays(stage: Stage, uid: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    path = stage.broken()
    os.lchown(path, uid, uid)
    stage.library.copy(SHOW, 1080)
    stage.scan()
    for args in (stage.cinesync_args("--apply"), ["undo", "--apply"]):
        stage.run(*args)
        status = os.lstat(path)
        assert (status.st_uid, status.st_gid) == (uid, uid)


def test_any_name_goes_in_and_comes_out(stage: Stage) -> None:
    """Not UTF-8, a newline, and as long as a name may be."""
    names = [
        os.fsdecode(b"Harbour Lights (2001)/Season 01/S01E01 caf\xe9.mkv"),
        "Harbour Lights (2001)/Season 01/S01E01\n\x1b[31m.mkv",
        "Harbour Lights (2001)/Season 01/S01E01 " + "x" * 244 + ".mkv",
    ]
    paths = [stage.broken(SHOW, 1080, name) for name in names]
    copy = stage.library.copy(SHOW, 1080)
    odd = copy.with_name(os.fsdecode(b"Harbour.Lights.S01E01.1080p.\xff.mkv"))
    real = Path(os.path.dirname(os.readlink(copy)), odd.name)
    os.rename(os.readlink(copy), real)
    copy.unlink()
    odd.symlink_to(real)
    before = stage.texts()
    stage.scan()
    assert stage.cinesync()["replaced"] == 3
    assert stage.texts() == dict.fromkeys(paths, str(real))
    assert stage.run("undo", "--apply")["restored"] == 3
    assert stage.texts() == before


# What can go wrong while a link is replaced: the old one stands


def fail(error: int, *_: object, **__: object) -> None:
    raise OSError(error, os.strerror(error))


@pytest.mark.parametrize(
    ("function", "error"),
    [("symlink", errno.ENOSPC), ("symlink", errno.EROFS), ("symlink", errno.ENAMETOOLONG),
     ("replace", errno.EACCES), ("replace", errno.EIO)],
)  # fmt: skip
def test_an_error_leaves_the_old_link(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, function: str, error: int
) -> None:
    path = stage.broken()
    stage.library.copy(SHOW, 1080)
    before = stage.texts()
    stage.scan()
    with monkeypatch.context() as patch:
        patch.setattr(program.os, function, functools.partial(fail, error))
        result = stage.cinesync()
    assert (result["exit_code"], result["errors"]) == (3, 1)
    assert reason(result, path) == os.strerror(error)
    assert stage.texts() == before
    (row,) = stage.query("SELECT state, reason FROM link_changes")
    assert row == ("failed", os.strerror(error))
    assert stage.cinesync()["replaced"] == 1


def test_somebody_else_is_quicker(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stage.broken()
    stage.library.copy(SHOW, 1080)
    stage.scan()
    symlink = os.symlink

    def meanwhile(text: str, temporary: str) -> None:
        symlink(text, temporary)
        os.unlink(path)
        symlink("/somebody/elses.mkv", path)

    monkeypatch.setattr(program.os, "symlink", meanwhile)
    result = stage.cinesync()
    assert "somebody else" in reason(result, path)
    assert stage.texts() == {path: "/somebody/elses.mkv"}
    assert result["exit_code"] == 3


def test_the_journal_is_written_first(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stage.broken()
    stage.library.copy(SHOW, 1080)
    stage.scan()
    seen: List[Any] = []
    symlink = os.symlink

    def look(text: str, temporary: str) -> None:
        seen.extend(stage.query("SELECT path, old_target, new_target, state FROM link_changes"))
        symlink(text, temporary)

    monkeypatch.setattr(program.os, "symlink", look)
    old = os.readlink(path)
    stage.cinesync()
    assert seen == [(path, old, os.readlink(path), "planned")]


def test_a_new_link_that_does_not_work_is_put_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stage.broken()
    copy = stage.library.copy(SHOW, 1080)
    before = stage.texts()
    stage.scan()
    replace = os.replace

    def then_it_goes(old: str, new: str) -> None:
        replace(old, new)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.readlink(copy))

    monkeypatch.setattr(program.os, "replace", then_it_goes)
    result = stage.cinesync()
    assert "put back" in reason(result, path)
    assert stage.texts() == before
    assert stage.query("SELECT state FROM link_changes") == [("failed",)]
    assert stage.run("undo", "--apply")["message"] == "no run has changed a link"


# The index


def test_only_what_changed_is_listed_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    library = stage.library
    stage.broken()
    library.fill(120)
    for folder, _, _ in os.walk(library.base):
        os.utime(folder, (1e9, 1e9))
    stage.scan()
    count = stage.cinesync()["indexed"]
    listed = stage.folder / "listed"
    visit_copies = program.visit_copies

    def note(looker: Any, base: str, folder: str, known: int) -> Any:
        answer = visit_copies(looker, base, folder, known)
        if answer and answer[1] is not None:
            with open(listed, "a") as stream:  # in another process
                stream.write(folder + "\n")
        return answer

    monkeypatch.setattr(program, "visit_copies", note)
    assert stage.cinesync()["indexed"] == count
    assert not listed.exists()
    copy = library.copy(Part("Newcomer", 2020), 1080)
    old = next(library.base.glob("Shows/*/*/*.mkv"))
    old.unlink()
    assert stage.cinesync()["indexed"] == count
    folders = set(listed.read_text().split("\n"))
    assert {str(copy.parent), str(copy.parent.parent), str(old.parent), ""} == folders
    paths = {path for (path,) in stage.query("SELECT path FROM cinesync_items")}
    assert str(copy) in paths
    assert str(old) not in paths
    assert len(paths) == count


def test_directories_that_just_changed_are_not_trusted(stage: Stage) -> None:
    stage.broken()
    stage.library.copy(SHOW, 1080)
    stage.scan()
    stage.cinesync()
    assert {0} == {mtime for (mtime,) in stage.query("SELECT mtime_ns FROM cinesync_folders")}


def test_a_shrunk_library_is_refused_and_forgets_nothing(stage: Stage) -> None:
    stage.broken()
    library = stage.library
    copies = [library.copy(Part("Filler", 2000, 1, (n,)), 1080) for n in range(1, 11)]
    stage.scan()
    assert stage.cinesync()["indexed"] == 10
    for copy in copies[:6]:
        copy.unlink()
    for _ in range(2):
        result = stage.cinesync()
        assert (result["exit_code"], result["status"]) == (4, "refused")
        assert "--accept-shrink" in result["message"]
        assert len(stage.query("SELECT id FROM cinesync_items")) == 10
    for copy in copies[:1]:
        copy.symlink_to(library.mount)
    assert stage.cinesync()["indexed"] == 5  # not more than half
    for copy in copies[:1] + copies[6:8]:
        copy.unlink()
    assert stage.cinesync()["exit_code"] == 4
    assert stage.cinesync("--accept-shrink")["indexed"] == 2
    assert stage.cinesync()["exit_code"] == 0


def test_a_directory_that_is_gone_takes_its_items_along(stage: Stage) -> None:
    stage.broken()
    copies = [stage.library.copy(Part("Filler", 2000 + n, 1, (1,)), 1080) for n in range(2)]
    stage.scan()
    assert stage.cinesync()["indexed"] == 2
    shutil.rmtree(copies[0].parent)
    assert stage.cinesync()["indexed"] == 1
    assert stage.query("SELECT path FROM cinesync_items") == [(str(copies[1]),)]
    folders = {path for (path,) in stage.query("SELECT path FROM cinesync_folders")}
    assert str(copies[1].parent) in folders
    assert str(copies[0].parent) not in folders


def test_an_unreadable_directory_keeps_its_items(stage: Stage, tmp_path: Path) -> None:
    stage.broken()
    library = stage.library
    for number in range(1, 4):
        library.copy(Part("Filler", 2000 + number, 1, (1,)), 1080)
    stage.scan()
    assert stage.cinesync()["indexed"] == 3
    shut = library.base / "KidsShows"
    folders = program.os.scandir

    def scandir(path: str) -> Any:
        if str(path).startswith(str(shut)):
            fail(errno.EIO)
        return folders(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.os, "scandir", scandir)
        assert stage.cinesync()["indexed"] == 3
    assert stage.cinesync()["indexed"] == 3


def test_items_of_another_base_are_forgotten(stage: Stage) -> None:
    stage.broken()
    stage.library.copy(SHOW, 1080)
    stage.scan()
    stage.cinesync()
    other = CineSyncLibrary(stage.folder, top="Other")
    other.copy(MOVIE, 1080)
    other.media = stage.library.media
    stage.library = other
    result = stage.cinesync()
    assert (result["indexed"], result["exit_code"]) == (1, 0)
    (row,) = stage.query("SELECT path, year, show_norm, tmdb_id FROM cinesync_items")
    assert row[1:] == (1999, "paper comet", None)


# Outages


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Tuple[Stage, tmpfs]]:
    """A stage whose files lie on a real tmpfs."""
    problem = tmpfs_available()
    if problem:
        pytest.skip(f"no tmpfs here: {problem}")
    (tmp_path / "cloud" / "mount").mkdir(parents=True)
    with tmpfs(str(tmp_path / "cloud" / "mount")) as mount:
        yield Stage(tmp_path, mount="cloud/mount"), mount


def fill_season(stage: Stage, count: int) -> List[str]:
    parts = [Part("Harbour Lights", 2001, 1, (n,)) for n in range(1, count + 1)]
    for part in parts:
        stage.library.copy(part, 1080)
    return [stage.broken(part) for part in parts]


def test_an_outage_before_the_run(cloud: Tuple[Stage, tmpfs]) -> None:
    stage, mount = cloud
    fill_season(stage, 3)
    before = stage.texts()
    stage.scan()
    mount.unmount()
    result = stage.cinesync()
    assert (result["exit_code"], result["replaced"]) == (4, 0)
    assert stage.texts() == before
    assert len(stage.query("SELECT id FROM cinesync_items")) == 3  # none is forgotten


@pytest.mark.parametrize("moment", [0, 3, 7])
def test_an_outage_in_the_middle(
    cloud: Tuple[Stage, tmpfs], monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    stage, mount = cloud
    paths = fill_season(stage, 9)
    before = stage.texts()
    stage.scan()
    replace, made = os.replace, [0]

    def count_down(old: str, new: str) -> None:
        if made[0] == moment:
            mount.unmount()
        made[0] += new in paths
        replace(old, new)

    monkeypatch.setattr(program, "CHANGES_AT_ONCE", 5)
    monkeypatch.setattr(program.os, "replace", count_down)
    result = stage.cinesync()
    assert result["exit_code"] == 4
    assert result["replaced"] == (moment // 5) * 5  # whole parts alone have been verified
    changed = {path for path, text in stage.texts().items() if text != before[path]}
    assert changed == {i["path"] for i in result["items"] if i["result"] == "replaced"}
    assert len(stage.texts()) == 9
    assert not stage.query("SELECT 1 FROM link_changes WHERE state = 'planned'")


@pytest.mark.parametrize("moment", ["before", "in the middle"])
def test_a_mount_that_hangs_does_not_hang_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    problem = fuse_available()
    if problem:
        pytest.skip(problem)
    (tmp_path / "point").mkdir()
    stage = Stage(tmp_path, mount="files")
    stage.config = "[scan]\nstat_timeout = 1s\n"
    files = stage.library.mount
    stage.library.mount = tmp_path / "point"
    make_file = functools.partial(_file_behind, stage.library, files)
    monkeypatch.setattr(stage.library, "file", make_file)
    with FuseMount(tmp_path / "point", files) as mount:
        fill_season(stage, 2)
        before = stage.texts()
        stage.scan()
        with monkeypatch.context() as patch:
            replace = os.replace

            def replace_and_hang(old: str, new: str) -> None:
                replace(old, new)
                if new in before:  # the mount itself uses os.replace, too
                    mount.hang()

            patch.setattr(program.os, "replace", replace_and_hang)
            if moment == "before":
                mount.hang()
            began = time.monotonic()
            result = stage.cinesync()
        assert time.monotonic() - began < 30
        assert (result["exit_code"], result["replaced"]) == (4, 0)
        assert result["errors"] == (0 if moment == "before" else 2)
        mount.heal()
        assert stage.texts() == before
        assert stage.cinesync()["replaced"] == 2


def _file_behind(
    library: CineSyncLibrary, files: Path, name: str, part: Part, height: int, exists: bool = True
) -> Path:
    (files / name).parent.mkdir(parents=True, exist_ok=True)
    (files / name).with_name("neighbour").touch()
    if exists:
        (files / name).write_bytes(b"video")
    library.files[str(library.mount / name)] = (part, height)
    return library.mount / name


# Undo


def test_undo(stage: Stage) -> None:
    paths = fill_season(stage, 4)
    before = stage.texts()
    stage.scan()
    assert stage.run("undo")["message"] == "no run has changed a link"
    run_id = stage.cinesync()["run_id"]
    after = stage.texts()
    preview = stage.run("undo")
    assert (preview["applied"], preview["run_id"], preview["restored"]) == (False, run_id, 0)
    assert [item["path"] for item in preview["items"]] == paths[::-1]  # newest first
    assert stage.texts() == after

    os.unlink(paths[0])
    os.symlink("/somebody/elses.mkv", paths[0])
    os.unlink(paths[1])
    result = stage.run("undo", run_id, "--apply")
    assert (result["restored"], result["skipped"], result["exit_code"]) == (2, 2, 3)
    assert {path: before[path] for path in paths[2:]} == {
        path: text for path, text in stage.texts().items() if path != paths[0]
    }
    assert os.readlink(paths[0]) == "/somebody/elses.mkv"
    item = result["items"][0]
    assert item == {
        "path": paths[3], "from": after[paths[3]], "to": before[paths[3]], "result": "restored",
        "reason": "",
    }  # fmt: skip
    states = stage.query(
        "SELECT run_id - ?, state, count(*) FROM link_changes GROUP BY 1, 2", run_id
    )
    assert states == [(0, "done", 2), (0, "undone", 2), (1, "done", 2)]
    (row,) = stage.query("SELECT status FROM symlinks WHERE path = ?", paths[3])
    assert row == ("broken",)


def test_undo_twice_says_so(stage: Stage) -> None:
    fill_season(stage, 2)
    stage.scan()
    run_id = stage.cinesync()["run_id"]
    stage.run("undo", "--apply")
    before = stage.texts()
    for args in ([], [run_id]):
        result = stage.run("undo", *args, "--apply")
        assert result["message"] == f"run {run_id} is undone already"
        assert (result["exit_code"], result["restored"], result["items"]) == (0, 0, [])
    result = stage.run("undo", 999)
    assert (result["exit_code"], "no run 999" in result["message"]) == (2, True)
    assert stage.texts() == before


def test_undo_of_single_links_and_not_of_removals(stage: Stage) -> None:
    paths = fill_season(stage, 3)
    before = stage.texts()
    stage.scan()
    run_id = stage.cinesync()["run_id"]
    with contextlib.closing(sqlite3.connect(str(stage.data / "symlinks.db"))) as conn, conn:
        conn.execute(  # as dispatch does
            "INSERT INTO link_changes (run_id, path, old_target, new_target, state, changed_utc) "
            "VALUES (?, '/gone.mkv', '/x', '', 'removed', '')",
            (run_id,),
        )
    assert stage.run("undo", "--apply", "--path", paths[1])["restored"] == 1
    assert os.readlink(paths[1]) == before[paths[1]]
    result = stage.run("undo", "--apply")
    assert (result["restored"], result["skipped"], result["exit_code"]) == (2, 0, 0)
    assert stage.texts() == before
    assert stage.query("SELECT count(*) FROM link_changes WHERE state = 'removed'") == [(1,)]


# Kills


def in_a_process(argv: Sequence[str], ready: Optional[int] = None) -> int:
    """Run the program in a fork of this process, and return its number."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            code = program.main(list(argv))
        finally:
            os._exit(code)
    return pid


@pytest.mark.parametrize("command", ["cinesync", "undo"])
def test_a_kill_at_any_moment(stage: Stage, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = int(os.environ.get("CINESYNC_KILLS", "60")) // (2 if command == "cinesync" else 3)
    monkeypatch.setattr(program, "CHANGES_AT_ONCE", 20)
    stage.library.fill(160, broken_every=2)
    for path in list(stage.library.truth):
        Path(os.readlink(path)).with_name("neighbour").touch()
    old = stage.texts()
    stage.scan()
    stage.cinesync()
    new = stage.texts()
    assert sum(new[path] != old[path] for path in old) > 50
    stage.run("undo", "--apply")
    if command == "undo":
        stage.cinesync()
    argv = stage.argv("undo", "--apply")
    if command == "cinesync":
        argv = stage.argv(*stage.cinesync_args("--apply"))
    began = time.monotonic()
    os.waitpid(in_a_process(argv), 0)
    whole = time.monotonic() - began
    stage.run(*(["undo", "--apply"] if command == "cinesync" else stage.cinesync_args("--apply")))
    chance = random.Random(5)
    killed = 0
    for _ in range(kills):
        pid = in_a_process(argv)
        time.sleep(chance.random() * whole)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        was_killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        killed += was_killed
        whole *= 1.05 if was_killed else 0.9  # the machine may be busier, or less busy, by now
        now = stage.texts()
        stray = [path for path in now if path not in old]
        assert all(os.path.basename(path).startswith(".refresherr-") for path in stray)
        assert all(now[path] in (old[path], new[path]) for path in old)
        assert set(old) <= set(now)
        if now == (new if command == "cinesync" else old):
            # All is done: begin anew.
            rest = ["undo", "--apply"] if command == "cinesync" else stage.cinesync_args("--apply")
            stage.run(*rest)
    assert killed > kills // 10
    stage.run(*argv[3:])
    assert set(stage.texts()) == set(old)
    assert not stage.query("SELECT 1 FROM link_changes WHERE state = 'planned'")
    for (run_id,) in stage.query("SELECT DISTINCT run_id FROM link_changes ORDER BY 1 DESC"):
        if stage.query("SELECT 1 FROM runs WHERE run_id = ? AND command = 'cinesync'", run_id):
            stage.run("undo", run_id, "--apply")
    assert stage.texts() == old


# Certain or silent: the real file's own name


DENIED = """
Show.2001.S01E01.Sample.1080p | Show.2001.S01E01.5.1080p | Show.2001.S01E01b.1080p
Show.1978.S01E01.1080p | Show.2001.S01E01.CD1.1080p | Show.2001.S01E01.Part1.1080p
Show.2001.1x1-1x2.1080p | Show.2001.S1.E1.E2.1080p | Show.2001.S01E01+02.1080p
Show.2001.E00.and.S01E01.1080p | Show.2001.S01E01.to.E12.1080p | Show.2001.Episode.1.22.1080p
Show.2001.E01-02.1080p | Show.2001.NCOP.1080p | Show.2001.SP1.1080p | Show.2001.1of6.1080p
Show.2001.S01E01.Trailer.1080p | Show.2001.Ep14.1080p | [Group] Show - 07 [1080p]
Show.2001.S01E01-S02E01.1080p | Show.2001.S01E20010105.1080p | Show.2001.S01E01.(1of2)
Show.2001.S01E01\u201302.1080p | Show.2001.S01E01\u2014E02.1080p | Show.2001.S01E01,02.1080p
Show.2001.S01E01;E02.1080p | Show.2001.S01E01..02.1080p | Show.2001.S01E01.a.02.1080p
Show.2001.S01E01.och.02.1080p | Show.2001.S01E01.tot.02.1080p | Show.2001.S01E01.plus.02.1080p
Show.2001.1x01b.1080p | Show.2001.01-02.1080p | Show 2001 [01~02] 1080p
"""
DENIED_FILMS = """
Film.2010.Making.Of.1080p | Film.2010.Digital.Extras | Film.2010.x02-Interview | Film.2010.CD1of2
Film.2010.SAMPLE | Film (2010) (1 of 2) | Film.2010.Bonus.Disc | Film.1984.1080p | Film_1984_1080p
[Group] Film 07 [1080p] | Film 07 | Film.2.2010.1080p | Film.2010.Part.2.1080p | Film (2010) pt1
Film.S01E01.2010.1080p | Film.2011.1080p | Film.2010.Deleted.Scenes | Film.2010.Gag-Reel
Film.2010.Trailer.1080p | Film.2010.Featurette | Film (2010) 07 [1080p]
Film.2010.B-Roll | Film.2010.Screen.Test
"""


def names(table: str) -> List[str]:
    return [name for line in table.strip().split("\n") for name in line.split(" | ")]


@pytest.mark.parametrize("name", names(DENIED) + names(DENIED_FILMS))
@pytest.mark.parametrize("renamed", [True, False])
def test_a_file_that_is_named_like_something_else_is_not_taken(
    stage: Stage, name: str, renamed: bool
) -> None:
    part = Part("Show", 2001, 1, (1,)) if name in names(DENIED) else Part("Film", 2010)
    stage.broken(part)
    real = stage.library.file(f"all/{name}/{name}.mkv", Part(name, 0), 1080)
    kind = "Shows/Show (2001)/Season 1" if part.season > 0 else "Movies/Film (2010)"
    shown = "Show - S01E01 - Name" if part.season > 0 else "Film (2010) 1080p"
    stage.library.item(Path(kind, f"{shown if renamed else name}.mkv"), real)
    stage.library.copy(Part("Filler", 1990, 1, (1,)), 1080)
    before = stage.texts()
    stage.scan()
    assert stage.cinesync()["replaced"] == 0
    assert stage.texts() == before


@pytest.mark.parametrize("shared", [True, False])
def test_a_series_without_a_year_matches_by_a_shared_file(stage: Stage, shared: bool) -> None:
    parts = [Part("Show", 2018, 1, (n,)) for n in (1, 2)]
    stage.broken(Part("Elsewhere", 1990, 1, (1,)))
    lost = stage.library.mount / "shows" / "Elsewhere.1990.S01.1080p.WEB-OLD" / "lost.mkv"
    path = stage.library.link("tv/Show/Season 01/Show - S01E01.mkv", lost)
    copies = [stage.library.copy(part, 1080) for part in parts]
    other = stage.library.file("a/Show.S01E02.mkv", parts[1], 1080)
    stage.library.link("tv/Show/Season 01/Show - S01E02.mkv",
        os.readlink(copies[1]) if shared else other)  # fmt: skip
    stage.scan()
    result = stage.cinesync()
    assert result["replaced"] == shared
    assert (os.readlink(path) == os.readlink(copies[0])) == shared


def test_the_year_that_the_server_tells(stage: Stage) -> None:
    path = stage.broken(SHOW, name="Show/Season 01/Show - S01E01.mkv")
    for year in (1998, 2018):
        stage.library.copy(Part("Show", year, 1, (1,)), 1080)
    stage.scan()
    with contextlib.closing(sqlite3.connect(str(stage.data / "symlinks.db"))) as conn, conn:
        conn.execute("INSERT INTO series (instance, sonarr_id, year) VALUES ('s', 1, 1998)")
        conn.execute(
            "INSERT INTO episode_files (instance, sonarr_series_id, symlink_path) "
            "VALUES ('s', 1, ?)",
            (path,),
        )
    assert "1998" in stage.cinesync()["items"][0]["new_target"]


def test_a_subtitle_never_gets_a_video(stage: Stage) -> None:
    stage.broken(name="Harbour Lights (2001)/Season 01/Harbour Lights - S01E01.en.srt")
    stage.library.copy(SHOW, 1080)
    stage.scan()
    assert stage.cinesync()["replaced"] == 0


ORDINARY = """
{t}.({y}).{c}.1080p.WEB.x264-GRP | {t}.{y}.{c}.Some.Words.1080p.WEB-DL.DDP5.1.H.264-NTb
{t}.{c}.720p.HDTV.x264-KILLERS | {t} - {c} - The Interview | {t}.{c}.PROPER.1080p.10bit.x265
{t}.{y}.{c}.24.Hours.1080p | {t} ({y}) - {c} - Part of It WEBDL-1080p | {c} - {t}
{t} {c} [1080p][AAC 2.0]-GRP | {t}.{c}v2.1080p | {t}_{c}_Name | [GRP] {t} - {c} (1080p) [ABCD1234]
{t}.{c}.A.Title.2014.1080p.WEB-DL.DD5.1 | {t} - {c} - Episode {e} WEBDL-1080p
{t}.{c}.MULTi.VFF.1080p.NF.WEB-DL.DDP5.1.Atmos.H264-FW | {t}.{c}.Ending.Part.2.1080p
"""


def test_ordinary_names_get_the_right_copy() -> None:
    """At least 97 in 100 names with SxxEyy or NxNN, library renamed and raw."""
    good = wrong = count = 0
    for number, title in enumerate(["Harbour Lights", "The 100", "Room 104", "Law & Order - CI"]):
        copies = []
        for form in names(ORDINARY):
            for season, episode in ((1, 1), (1, 12), (3, 7), (0, 2)):
                code = (f"S{season:02}E{episode:02}", f"{season}x{episode:02}")[number % 2]
                raw = form.format(t=title.replace(" ", "."), y=2001, c=code, e=episode)
                path = f"/Shows/{title} (2001)/Season {season}/{raw}.mkv"
                copies.append((season, episode, program.parse_work(path)._replace(path=path)))
        for season, episode, copy in copies:
            for form in names(ORDINARY):
                code = (f"S{season:02}E{episode:02}", f"{season}x{episode:02}")[number % 2]
                raw = form.format(t=title, y=2001, c=code, e=episode)
                wanted = program.parse_work(f"/{title} (2001)/Season {season}/{raw}.mkv")
                found = program.match_work(wanted, [copy])[0]
                real = "/m/x/" + os.path.basename(copy.path)
                good += bool(found) and not program.is_denied(wanted, real)
                count += 1
            others = [c for s, e, c in copies if (s, e) != (season, episode)]
            wrong += len(program.match_work(wanted, others)[0])
    assert (wrong, good / count > 0.97) == (0, True), good / count


# The user's own spelling


def test_a_share_that_is_a_symlink_is_written_as_the_user_writes_it(stage: Stage) -> None:
    """Unraid's /mnt/user: the media server's container has it, not what it leads to."""
    library = stage.library
    share = stage.folder / "user"
    share.symlink_to(library.mount)
    path, second = stage.broken(), stage.broken(MOVIE)
    for link in (path, second):
        old = os.readlink(link).replace(str(library.mount), str(share))
        os.unlink(link)
        os.symlink(old if link == path else os.path.relpath(old, os.path.dirname(link)), link)
    copies = library.copy(SHOW, 1080), library.copy(MOVIE, 1080)
    before = stage.texts()
    stage.scan()
    args = ["cinesync", *stage.options, "--base", library.base, "--root", library.media]
    assert stage.run(*args, "--allow-target", share, "--apply")["replaced"] == 2
    reals = [os.readlink(copy).replace(str(library.mount), str(share)) for copy in copies]
    assert stage.texts() == {path: reals[0], second: os.path.relpath(reals[1], Path(second).parent)}
    assert all(map(os.path.exists, (path, second)))
    assert stage.run("undo", "--apply")["restored"] == 2
    assert stage.texts() == before


def test_the_share_need_not_be_among_the_allowed_targets(stage: Stage) -> None:
    library, share = stage.library, stage.folder / "user"
    share.symlink_to(library.mount)
    path = stage.broken()
    old = os.readlink(path).replace(str(library.mount), str(share))
    os.unlink(path)
    os.symlink(old, path)
    copy = library.copy(SHOW, 1080)
    stage.scan()
    assert stage.cinesync()["replaced"] == 1
    assert os.readlink(path) == os.readlink(copy).replace(str(library.mount), str(share))


@pytest.mark.parametrize(
    ("prefixes", "old", "spelled"),
    [
        ({"/user": "/cache"}, "/user/b.mkv", "/user/x/a.mkv"),
        ({"/user": "/cache"}, "../user/b.mkv", "../user/x/a.mkv"),
        ({"/user": "/cache", "/cache": "/cache"}, "/cache/b.mkv", "/cache/x/a.mkv"),
        ({"/user": "/cache", "/cache": "/cache"}, "/user/b.mkv", "/user/x/a.mkv"),
        ({"/": "/"}, "/old/b.mkv", "/cache/x/a.mkv"),
        ({"/u": "/cache/x/"}, "/old/b.mkv", "/u/a.mkv"),
    ],
)
def test_spell_target(prefixes: Dict[str, str], old: str, spelled: str) -> None:
    assert program.spell_target("/cache/x/a.mkv", prefixes, "/tv/b.mkv", old) == spelled


@pytest.mark.parametrize(
    ("old", "goal", "spelled"),
    [
        ("/user/b.mkv", "/cache/b.mkv", "/user/x/a.mkv"),
        ("/user/y/z/b.mkv", "/cache/y/z/b.mkv", "/user/x/a.mkv"),
        ("../user/b.mkv", "/cache/b.mkv", "../user/x/a.mkv"),
        ("/user/x/b.mkv", "/elsewhere/x/b.mkv", "/cache/x/a.mkv"),
        ("/cache/b.mkv", "/cache/b.mkv", "/cache/x/a.mkv"),
        ("/user/b.mkv", "", "/cache/x/a.mkv"),
    ],
)
def test_the_old_targets_own_prefix_is_kept(old: str, goal: str, spelled: str) -> None:
    allowed = {"/cache": "/cache"}
    assert program.spell_target("/cache/x/a.mkv", allowed, "/tv/b.mkv", old, goal) == spelled


def test_a_link_that_leads_to_another_file_is_put_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stage.broken()
    stage.library.copy(SHOW, 1080)
    other = stage.library.file("other/Other.S01E01.1080p.mkv", SHOW, 1080)
    before = stage.texts()
    stage.scan()
    monkeypatch.setattr(program, "spell_target", lambda *_: str(other))
    assert "put back" in reason(stage.cinesync(), path)
    assert stage.texts() == before


# The mount has moved


def test_retarget(stage: Stage) -> None:
    paths = fill_season(stage, 3)
    library = stage.library
    new = stage.folder / "new"
    for path in paths[:2]:
        moved = new / os.path.relpath(os.readlink(path), library.mount)
        moved.parent.mkdir(parents=True, exist_ok=True)
        moved.write_bytes(b"video")
    text = os.path.relpath(os.readlink(paths[1]), os.path.dirname(paths[1]))
    os.unlink(paths[1])
    os.symlink(text, paths[1])
    before = stage.texts()
    stage.scan()
    preview = stage.run("retarget", library.mount, new)
    assert [item["result"] for item in preview["items"]] == ["would replace"] * 2 + ["skipped"]
    assert stage.texts() == before
    refused = stage.run("retarget", library.mount, stage.folder / "absent", "--apply")
    assert refused["exit_code"] == 4
    result = stage.run("retarget", library.mount, new, "--apply")
    assert (result["restored"], result["skipped"], result["exit_code"]) == (2, 1, 3)
    assert [os.path.exists(path) for path in paths] == [True, True, False]
    assert [os.path.isabs(os.readlink(path)) for path in paths] == [True, False, True]
    assert stage.texts()[paths[2]] == before[paths[2]]
    assert stage.run("undo", result["run_id"], "--apply")["restored"] == 2
    assert stage.texts() == before


def test_retarget_to_a_mount_that_is_empty_is_refused(stage: Stage) -> None:
    """One that is remembered: its files may only be away."""
    reason = tmpfs_available()
    if reason:
        pytest.skip(f"no tmpfs here: {reason}")
    fill_season(stage, 1)
    new = stage.folder / "new"
    new.mkdir()
    with tmpfs(new):
        (new / "a.mkv").write_bytes(b"video")
        (stage.library.media / "a.mkv").symlink_to(new / "a.mkv")
        stage.scan()
        (new / "a.mkv").unlink()
        before = stage.texts()
        result = stage.run("retarget", stage.library.mount, new, "--apply")
        assert (result["exit_code"], stage.texts()) == (4, before)
        assert str(new) in result["message"] and "empty" in result["message"]


def test_retarget_leaves_alone_what_works_again(stage: Stage) -> None:
    (path,) = fill_season(stage, 1)
    moved = stage.folder / "new" / os.path.relpath(os.readlink(path), stage.library.mount)
    moved.parent.mkdir(parents=True)
    moved.write_bytes(b"video")
    stage.scan()
    Path(os.readlink(path)).write_bytes(b"video")
    before = stage.texts()
    result = stage.run("retarget", stage.library.mount, stage.folder / "new", "--apply")
    assert (result["restored"], stage.texts()) == (0, before)


def test_retarget_wants_the_size_that_the_server_knows(stage: Stage) -> None:
    paths = fill_season(stage, 3)
    library, size = stage.library, 5000
    for path in paths:
        moved = stage.folder / "new" / os.path.relpath(os.readlink(path), library.mount)
        moved.parent.mkdir(parents=True, exist_ok=True)
        moved.write_bytes(b"x" * size)
    before = stage.texts()
    stage.scan()
    with contextlib.closing(sqlite3.connect(str(stage.data / "symlinks.db"))) as conn, conn:
        # The size of another file; the right one; of the link itself, as some servers tell it.
        rows = list(zip(paths, (size + 1, size, len(before[paths[2]]))))
        insert = "INSERT INTO episode_files (instance, symlink_path, size_bytes) VALUES ('s', ?, ?)"
        conn.executemany(insert, rows)
    result = stage.run("retarget", library.mount, stage.folder / "new", "--apply")
    assert (result["restored"], result["skipped"], result["exit_code"]) == (2, 1, 3)
    assert "5,000 bytes, not 5,001" in reason(result, paths[0])
    assert {path for path, text in stage.texts().items() if text == before[path]} == {paths[0]}


@pytest.mark.parametrize(
    ("moved_to", "old", "new"),
    [
        ("{mount}/tv", "{mount}/shows", "{mount}/tv"),  # a sibling
        ("{mount}", "{mount}/shows", "{mount}"),  # a level higher
        ("{mount}/all/shows", "{mount}", "{mount}/all"),  # a level lower
        ("{mount}/shows/all", "{mount}/shows", "{mount}/shows/all"),
        ("{folder}/mount2/shows", "{mount}", "{folder}/mount2"),
        ("{folder}/far/away/shows", "", ""),
    ],
)
def test_a_loss_that_has_moved_proposes_retarget(
    stage: Stage, moved_to: str, old: str, new: str
) -> None:
    places = {"mount": stage.library.mount, "folder": stage.folder}
    parts = [Part("Harbour Lights", 2001 + n, 1, (1,)) for n in range(12)]
    links = [stage.library.library_link(part, 1080, broken=False) for part in parts]
    stage.library.library_link(MOVIE, 1080, broken=False)  # what stays
    stage.run("scan", *stage.roots())
    goals = {os.readlink(link) for link in links}
    for goal in goals:
        place = moved_to.format(**places) + goal[len(f"{stage.library.mount}/shows") :]
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.rename(goal, place)
        os.rmdir(os.path.dirname(goal))
    result = stage.run("scan", *stage.roots())
    assert result["exit_code"] == 4
    wanted = f"`retarget {old} {new}`".format(**places)
    assert (wanted in result["message"]) == bool(old)
    assert ("retarget" in result["message"]) == bool(old)
    if old:
        places_now = (old.format(**places), new.format(**places))
        assert stage.run("retarget", *places_now, "--apply")["restored"] == 12
        assert all(map(os.path.exists, links))


def test_a_killed_retarget_leaves_each_link_old_or_new(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "CHANGES_AT_ONCE", 10)
    paths = fill_season(stage, 80)
    new = stage.folder / "new"
    for path in paths:
        moved = new / os.path.relpath(os.readlink(path), stage.library.mount)
        moved.parent.mkdir(parents=True, exist_ok=True)
        moved.write_bytes(b"video")
    old = stage.texts()
    goals = {p: text.replace(str(stage.library.mount), str(new)) for p, text in old.items()}
    stage.scan()
    argv = stage.argv("retarget", stage.library.mount, new, "--apply")
    chance, partly = random.Random(3), 0
    for _ in range(6):
        pid = in_a_process(argv)
        limit = time.monotonic() + 20
        while stage.texts() == old and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        now = stage.texts()
        assert all(now[path] in (old[path], goals[path]) for path in old)
        partly += any(now[p] == old[p] for p in old) and any(now[p] != old[p] for p in old)
        stage.run(*argv[3:])  # the rest is done by the next run
        assert stage.texts() == goals
        runs = "SELECT DISTINCT run_id FROM link_changes WHERE state = 'done' ORDER BY 1 DESC"
        for (run_id,) in stage.query(runs):
            if stage.query("SELECT 1 FROM runs WHERE run_id = ? AND command = 'retarget'", run_id):
                stage.run("undo", run_id, "--apply")
        assert stage.texts() == old
    assert partly
