"""The scan of a healthy system: every link judged, every change of state recorded once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set

import pytest
from conftest import Library, Refresherr, target_of
from fuse_fs import FuseMount, fuse_available

import refresherr as program

LONG_AGO = "2001-02-03T04:05:06+00:00"
NO_CHANGES = {"new": 0, "newly_broken": 0, "recovered": 0, "vanished": 0}


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[FuseMount]:
    """The directory tmp_path/backend, seen through FUSE at tmp_path/cloud, nothing cached."""
    reason = fuse_available()
    if reason:
        pytest.skip(reason)
    point, backend = tmp_path / "cloud", tmp_path / "backend"
    point.mkdir()
    backend.mkdir()
    with FuseMount(point, backend, timeout=0) as mount:
        yield mount


def make_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"video")
    return path


def make_link(path: Path, target: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(str(target), str(path))
    return path


def named(paths: Dict[Path, str]) -> Dict[str, str]:
    return {str(path): status for path, status in paths.items()}


def alter(refresherr: Refresherr, sql: str, *values: object) -> None:
    """Change the database, past the program."""
    conn = sqlite3.connect(str(refresherr.db_path))
    with conn:
        conn.execute(sql, values)
    conn.close()


def eventually(condition: Callable[[], Any]) -> None:
    """Wait until it holds; the limit is only there to fail instead of hanging."""
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


# Every shape of link


def test_every_shape_of_link_is_judged(refresherr: Refresherr, library: Library) -> None:
    media, mount = library.root, library.mount
    real = make_file(mount / "real.mkv")
    make_file(mount / "folder" / "inner.mkv")
    make_link(mount / "folder" / "never seen", "nowhere")
    make_file(media / "lexical.mkv")
    shapes = {
        "absolute": (real, "ok"),
        "relative": ("../mount/real.mkv", "ok"),
        "a/b/c/deep": ("../../../../mount/./folder/../real.mkv", "ok"),
        "doubled slashes": (f"/{mount}//real.mkv", "ok"),
        "device": ("/dev/null", "ok"),
        "to directory": (mount / "folder", "ok"),
        "to directory, slash": (f"{mount}/folder/", "ok"),
        "to itself above": ("..", "ok"),
        "to here": (".", "ok"),
        "through a link to a directory": ("to directory/inner.mkv", "ok"),
        # ".." behind a link leads to where the link leads, not back to the link.
        "physical parent": ("to directory/../real.mkv", "ok"),
        "lexical parent": ("to directory/../lexical.mkv", "broken"),
        "dangling": (mount / "gone.mkv", "broken"),
        "dangling relative": ("../mount/gone.mkv", "broken"),
        "chain to nowhere": ("dangling", "broken"),
        "below a file": (mount / "real.mkv" / "x.mkv", "broken"),
        "a file with a slash": (f"{real}/", "broken"),
        "self": ("self", "broken"),
        "loop 1": ("loop 2", "broken"),
        "loop 2": ("loop 1", "broken"),
    }
    expected = {
        make_link(media / name, target): status for name, (target, status) in shapes.items()
    }
    # The kernel follows 40 links: the end of this chain is ELOOP, its beginning is not.
    chain = [media / f"chain {number:02d}" for number in range(44)]
    for link, target in zip(chain, [real, *chain]):
        make_link(link, target)
        expected[link] = "ok" if link.exists() else "broken"
    assert expected[chain[30]] == "ok" and expected[chain[-1]] == "broken"

    scan = refresherr.scan(media)
    assert refresherr.statuses() == named(expected)
    counts = {word: list(expected.values()).count(word) for word in ("ok", "broken")}
    totals = {**counts, "examined": len(expected), "unreachable": 0, "missing": 0, "ignored": 0}
    assert scan["totals"] == totals
    assert scan["changes"] == {**NO_CHANGES, "new": len(expected), "newly_broken": counts["broken"]}
    assert (scan["exit_code"], scan["status"]) == (0, "ok")
    assert refresherr.scan(media)["changes"] == NO_CHANGES


NAMES = [
    b"latin-1 caf\xe9.mkv",
    b"\xff\xfe\x80.mkv",
    b"surrogate \xed\xb3\xbf.mkv",
    "NFC caf\u00e9.mkv".encode(),
    "NFD cafe\u0301.mkv".encode(),
    "NFC caf\u00e9".encode() + b"\xff",
    "emoji \U0001f3ac.mkv".encode(),
    b"new\nline.mkv",
    b"tab\tand\rreturn.mkv",
    b"\x1b[31mred\x07.mkv",
    "\u202eright to left.mkv".encode(),
    b"quotes ' \" ` $HOME %s {} \\ ;--.mkv",
    b" leading and trailing ",
    b"-n",
    b"*?[a-z].mkv",
    b"x" * 251 + b".mkv",
    b"...",
]


def test_any_name_goes_in_and_comes_out(
    refresherr: Refresherr, write_config: Callable[[str], Path], tmp_path: Path
) -> None:
    write_config("[scan]\nmax_new_broken = 100%\n")
    media, mount = (os.fsencode(str(tmp_path / name)) for name in ("media", "mount"))
    links: Dict[str, bytes] = {}
    for name in NAMES:
        for folder in (media, mount):
            os.makedirs(os.path.join(folder, name))
        target = os.path.join(mount, name, name)
        link = os.path.join(media, name, name)
        os.symlink(target, link)
        links[os.fsdecode(link)] = target
        with open(target, "wb"):
            pass
    root = os.fsdecode(media)
    witness = make_link(tmp_path / "media/witness", make_file(tmp_path / "mount/witness"))
    assert refresherr.scan(root)["totals"]["ok"] == len(NAMES) + 1
    assert refresherr.statuses() == dict.fromkeys([*links, str(witness)], "ok")

    for target in links.values():
        os.rename(target, os.path.dirname(target) + b"/moved")
    assert refresherr.scan(root)["changes"] == {**NO_CHANGES, "newly_broken": len(NAMES)}
    shown = refresherr("broken", "--json").json["links"]
    assert {link["path"]: os.fsencode(link["target"]) for link in shown} == links
    text = refresherr("broken").out
    assert not [char for char in text if char != "\n" and not char.isprintable()]

    for target in links.values():
        os.rename(os.path.dirname(target) + b"/moved", target)
    assert refresherr.scan(root)["changes"] == {**NO_CHANGES, "recovered": len(NAMES)}
    for link in links:
        os.remove(os.fsencode(link))
    assert refresherr.scan(root)["changes"] == {**NO_CHANGES, "vanished": len(NAMES)}
    gone = {**dict.fromkeys(links, "missing"), str(witness): "ok"}
    assert refresherr.statuses() == gone


# Roots


def test_a_root_may_be_a_symlink(refresherr: Refresherr, library: Library) -> None:
    library.link("Show/a.mkv")
    library.link("b.mkv", exists=False)
    alias = make_link(library.root.parent / "alias", "media")
    expected = {alias / "Show" / "a.mkv": "ok", alias / "b.mkv": "broken"}
    for root in (alias, f"{alias}/"):
        refresherr.scan(root)
        assert refresherr.statuses() == named(expected)


@pytest.mark.parametrize(
    "roots",
    [
        ["media", "media"],
        ["media", "media/"],
        ["media", "media/tv"],
        ["media/tv", "media"],
        ["media/tv/Show", "media", "media/tv"],
        ["media", "alias"],
        ["alias", "media/tv"],
    ],
)
def test_overlapping_roots_are_walked_once(
    refresherr: Refresherr, library: Library, roots: List[str]
) -> None:
    for name in ("a.mkv", "tv/b.mkv", "tv/Show/c.mkv", "tv/Show 2/d.mkv"):
        library.link(name)
    make_link(library.root.parent / "alias", "media")
    paths = [f"{library.root.parent}/{root}" for root in roots]
    for new in (4, 0):
        scan = refresherr.scan(*paths)
        assert scan["changes"] == {**NO_CHANGES, "new": new}
        assert (scan["totals"]["examined"], scan["totals"]["ok"], scan["exit_code"]) == (4, 4, 0)
        assert sum(root["examined"] for root in scan["roots"]) == 4
        assert list(refresherr.statuses().values()) == ["ok"] * 4


def test_a_root_inside_another_scanned_before_makes_no_second_row(
    refresherr: Refresherr, library: Library
) -> None:
    library.link("tv/a.mkv")
    other = library.link("movies/b.mkv")
    refresherr.scan(library.root / "tv")
    assert refresherr.scan(library.root)["changes"]["new"] == 1
    other.unlink()
    assert refresherr.scan(library.root / "tv")["changes"]["vanished"] == 0, "not its business"
    assert sorted(refresherr.statuses().values()) == ["ok", "ok"]


def test_a_relative_root(
    refresherr: Refresherr, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = library.link("tv/a.mkv")
    monkeypatch.chdir(library.root / "tv")
    for root in (".", "../tv", "../../media/tv/"):
        refresherr.scan(root)
        assert refresherr.statuses() == {str(link): "ok"}


@pytest.mark.parametrize("by_environment", [False, True])
def test_ignored_entries(
    refresherr: Refresherr,
    library: Library,
    write_config: Callable[[str], Path],
    by_environment: bool,
) -> None:
    kept = ["tv/a.mkv", "tv/partial.mkv", "tv/Samples/x.mkv", "tv/Oldest/a.mkv"]
    skipped = [
        "my cinesync copies/a.mkv",  # a directory is one entry, whatever is in it
        "tv/@eaDir/a.mkv",
        "tv/xcinesyncx.mkv",
        "tv/a.partial",
        "tv/Sample/x.mkv",
        "tv/Old/a.mkv",
    ]
    links = {name: library.link(name) for name in kept + skipped}
    library.link("my cinesync copies/b.mkv")
    assert refresherr.scan(library.root)["totals"]["examined"] == len(links)
    patterns = ["cinesync", "*.partial", "S?mple", "tv/Old/"]
    if by_environment:
        refresherr.env["IGNORE_SUBSTR"] = ",".join(patterns)
    else:
        write_config("[scan]\nignore =\n" + "".join(f"    {p}\n" for p in patterns))
    for _ in range(2):
        scan = refresherr.scan(library.root)
        assert (scan["totals"]["ignored"], scan["totals"]["examined"]) == (6, len(kept))
        assert (scan["totals"]["missing"], scan["changes"]) == (0, NO_CHANGES)
        assert refresherr.statuses() == named({links[name]: "ok" for name in kept})


def test_directories_that_a_nas_keeps_for_itself(
    refresherr: Refresherr, library: Library, write_config: Callable[[str], Path]
) -> None:
    """They are skipped below a root, as whole names; a root may itself lie in one."""
    root = library.root / ".snapshots" / "tv"
    kept = [".snapshots/tv/a/1.mkv", ".snapshots/tv/my #recycle bin/2.mkv"]
    bins = [".snapshots/tv/#recycle/3.mkv", ".snapshots/tv/a/.Trash-1000/files/4.mkv"]
    links = {name: library.link(name) for name in kept + bins}
    for wanted, text in ((kept, ""), (kept + bins, "ignore_defaults = no"), (kept, "")):
        write_config(f"[scan]\nroots = {root}\n{text}\n")
        totals = refresherr.scan()["totals"]
        assert (totals["examined"], totals["missing"]) == (len(wanted), 0)
        assert totals["ignored"] == (0 if text else 2)
        assert refresherr.statuses() == named({links[name]: "ok" for name in wanted})


# From state to state


@pytest.mark.parametrize(
    ("story", "newly_broken", "recovered"),
    [
        ("ok ok broken broken ok ok", {2}, {4}),
        ("broken ok broken", {0, 2}, {1}),
        ("ok broken unreachable ok", {1}, {3}),
        ("ok broken unreachable broken ok", {1}, {4}),
        ("ok unreachable unreachable broken broken", {3}, set()),
        ("ok unreachable ok", set(), set()),
        ("ok missing ok missing", set(), set()),
        ("ok broken unreachable missing", {1}, set()),
    ],
)
def test_a_link_from_state_to_state(
    refresherr: Refresherr,
    cloud: FuseMount,
    tmp_path: Path,
    story: str,
    newly_broken: Set[int],
    recovered: Set[int],
) -> None:
    target = make_file(tmp_path / "backend/release/Show.S01E02.mkv")
    make_file(tmp_path / "backend/release/neighbour.mkv")
    make_link(tmp_path / "media/neighbour.mkv", tmp_path / "cloud/release/neighbour.mkv")
    link = tmp_path / "media/Show/Season 01/Show - S01E02.mkv"
    link.parent.mkdir(parents=True)
    before: Optional[str] = "ok"  # a new link that is ok makes no event
    since, events = None, 0
    for step, status in enumerate(story.split()):
        target.unlink() if target.exists() else None
        link.unlink() if link.is_symlink() else None
        if status in ("ok", "unreachable"):
            make_file(target)
        if status != "missing":
            make_link(link, tmp_path / "cloud/release/Show.S01E02.mkv")
        unreachable = status == "unreachable"
        cloud.fail_paths({"release/Show.S01E02.mkv": errno.EIO} if unreachable else {})

        scan = refresherr.scan(tmp_path / "media")
        assert scan["exit_code"] == (3 if unreachable else 0), json.dumps(scan)
        assert scan["changes"] == {
            "new": 2 if step == 0 else 0,
            "newly_broken": int(step in newly_broken),
            "recovered": int(step in recovered),
            "vanished": int(status == "missing" != before),
        }
        row = "SELECT status, last_status, broken_since_utc FROM symlinks WHERE path = ?"
        now, last, new_since = refresherr.query(row, str(link))[0]
        assert (now, last) == (status, status)
        if status == "ok":
            assert new_since is None
        elif status == "broken" and since is None:
            assert new_since > LONG_AGO
        elif status != "missing":
            assert new_since == since
        rows = refresherr.query("SELECT path, kind, name, status FROM events ORDER BY id")[events:]
        changed = [(str(link), "episode", "Show", status)]
        assert rows == (changed if status != before else []), f"step {step}"

        if new_since:  # as if it had been long ago, so that a new time would be another
            since = LONG_AGO
            alter(
                refresherr,
                "UPDATE symlinks SET broken_since_utc = ? WHERE path = ?",
                since,
                str(link),
            )
        else:
            since = None
        before, events = status, events + len(rows)


def test_every_scan_moves_last_seen_on(refresherr: Refresherr, library: Library) -> None:
    library.link("ok.mkv")
    library.link("broken.mkv", exists=False)
    too_long = library.link("unreachable.mkv", "x" * 256, exists=False)  # ENAMETOOLONG
    gone = library.link("missing.mkv")
    refresherr.scan(library.root)
    update = "UPDATE symlinks SET first_seen_utc = ?, last_seen_utc = ?"
    alter(refresherr, update, LONG_AGO, LONG_AGO)
    gone.unlink()
    scan = refresherr.scan(library.root)
    rows = refresherr.query("SELECT path, first_seen_utc, last_seen_utc FROM symlinks")
    assert {path for path, _, last in rows if last == LONG_AGO} == {str(gone)}
    assert {first for _, first, _ in rows} == {LONG_AGO}
    assert refresherr.statuses()[str(too_long)] == "unreachable"
    assert scan["exit_code"] == 3


def test_a_link_that_leads_elsewhere_now(refresherr: Refresherr, library: Library) -> None:
    healed = library.link("healed.mkv", exists=False)
    moved = library.link("moved.mkv")
    dies = library.link("dies.mkv")
    refresherr.scan(library.root)
    new = {
        healed: make_file(library.mount / "new" / "1.mkv"),
        moved: make_file(library.mount / "new" / "2.mkv"),
        dies: library.mount / "new" / "3.mkv",
    }
    for link, target in new.items():
        link.unlink()
        make_link(link, target)
    changes = refresherr.scan(library.root)["changes"]
    assert changes == {**NO_CHANGES, "newly_broken": 1, "recovered": 1}
    assert refresherr.statuses() == named({healed: "ok", moved: "ok", dies: "broken"})
    rows = refresherr.query("SELECT path, last_target FROM symlinks")
    assert dict(rows) == {str(link): str(target) for link, target in new.items()}
    events = refresherr.query("SELECT path, target, status FROM events")
    assert sorted(events[1:]) == sorted(
        [(str(dies), str(new[dies]), "broken"), (str(healed), str(new[healed]), "ok")]
    )


@pytest.mark.parametrize("instead", ["nothing", "file", "directory", "no parent"])
def test_a_link_that_is_gone_is_missing(
    refresherr: Refresherr, library: Library, instead: str
) -> None:
    library.link("stays.mkv")
    link = library.link("Show/a.mkv")
    refresherr.scan(library.root)
    link.unlink()
    if instead == "file":
        make_file(link)
    elif instead == "directory":
        link.mkdir()
    elif instead == "no parent":
        link.parent.rmdir()
    for vanished in (1, 0):
        scan = refresherr.scan(library.root)
        assert scan["changes"] == {**NO_CHANGES, "vanished": vanished}
        assert (scan["totals"]["missing"], scan["totals"]["examined"]) == (1, 1)
        assert (scan["exit_code"], refresherr.statuses()[str(link)]) == (0, "missing")
    if link.is_dir():
        link.rmdir()
    elif link.exists():
        link.unlink()
    make_link(link, library.mount / "Show/a.mkv")
    assert refresherr.scan(library.root)["totals"]["missing"] == 0


# What cannot be read


@pytest.mark.parametrize(
    ("code", "neighbours"),
    [
        (errno.EIO, 0),
        (errno.EIO, 20),
        (errno.EACCES, 0),
        (errno.EACCES, 20),
        (errno.ENOTCONN, 0),
        (errno.ESTALE, 0),
    ],
)
def test_one_target_that_cannot_be_looked_up(
    refresherr: Refresherr, cloud: FuseMount, tmp_path: Path, code: int, neighbours: int
) -> None:
    names = ["bad.mkv", *(f"good {number}.mkv" for number in range(neighbours))]
    links = [make_link(tmp_path / "media" / n, tmp_path / "cloud/release" / n) for n in names]
    for name in (*names, "unlinked.mkv"):
        make_file(tmp_path / "backend/release" / name)
    links.append(make_link(tmp_path / "media/witness", tmp_path / "cloud/release/unlinked.mkv"))
    gone = make_link(tmp_path / "media/gone.mkv", tmp_path / "cloud/release/gone.mkv")
    expected = {**dict.fromkeys(links, "ok"), links[0]: "unreachable", gone: "broken"}
    cloud.fail_paths({"release/bad.mkv": code})
    for _ in range(2):
        scan = refresherr.scan(tmp_path / "media", "--exit-code")
        assert refresherr.statuses() == named(expected)
        assert (scan["exit_code"], scan["status"]) == (3, "partial")
        assert scan["guard"]["tripped"] is False
    cloud.heal()
    assert refresherr.scan(tmp_path / "media", "--exit-code")["exit_code"] == 10
    assert refresherr.statuses()[str(links[0])] == "ok"


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("where", ["Show", "Show/Season 01", "Show/Season 01/a.mkv"])
def test_what_cannot_be_read_in_the_library_stays_as_it_was(
    refresherr: Refresherr, cloud: FuseMount, tmp_path: Path, where: str, code: int
) -> None:
    """The links themselves lie on the mount here, and vanish while nobody can see it."""
    library = tmp_path / "backend"
    for name in ("a", "b"):
        make_file(tmp_path / "disk" / name)
    hidden = make_link(library / "Show/Season 01/a.mkv", tmp_path / "disk/a")
    make_link(library / "Other/b.mkv", tmp_path / "disk/b")
    make_link(library / "Other/witness.mkv", make_file(tmp_path / "disk/c"))
    seen = {
        name: str(tmp_path / "cloud" / name)
        for name in ("Show/Season 01/a.mkv", "Other/b.mkv", "Other/witness.mkv")
    }
    refresherr.scan(tmp_path / "cloud")
    cloud.fail_paths({where: code})
    if where.endswith(".mkv"):
        (tmp_path / "disk/a").unlink()
    else:
        hidden.unlink()
    (tmp_path / "disk/b").unlink()
    scan = refresherr.scan(tmp_path / "cloud")
    assert refresherr.statuses() == {
        seen["Show/Season 01/a.mkv"]: "ok",
        seen["Other/b.mkv"]: "broken",
        seen["Other/witness.mkv"]: "ok",
    }
    assert (scan["exit_code"], scan["changes"]["vanished"], scan["totals"]["missing"]) == (3, 0, 0)
    cloud.heal()
    assert refresherr.scan(tmp_path / "cloud")["exit_code"] == 0
    truth = "broken" if where.endswith(".mkv") else "missing"
    assert refresherr.statuses()[seen["Show/Season 01/a.mkv"]] == truth


# Exit status and JSON


@pytest.mark.parametrize(
    ("roots", "options", "code", "word"),
    [
        (["good"], [], 0, "ok"),
        (["good"], ["--exit-code"], 0, "ok"),
        (["bad"], [], 0, "ok"),
        (["bad"], ["--exit-code"], 10, "ok"),
        (["bad", "absent"], ["--exit-code"], 3, "partial"),
        (["good", "file"], [], 3, "partial"),
        (["absent"], [], 1, "error"),
        (["absent", "file"], [], 1, "error"),
        ([], [], 2, "error"),
    ],
)
def test_exit_status(
    refresherr: Refresherr,
    tmp_path: Path,
    roots: Sequence[str],
    options: Sequence[str],
    code: int,
    word: str,
) -> None:
    file = make_file(tmp_path / "file")
    make_link(tmp_path / "good/a", file)
    make_link(tmp_path / "bad/b", tmp_path / "nothing")
    make_link(tmp_path / "bad/c", file)  # a loss needs a witness
    args = [*(str(tmp_path / root) for root in roots), *options]
    result = refresherr("scan", "--json", *args)
    answer = result.json
    assert (result.code, answer["exit_code"], answer["status"]) == (code, code, word), result.err
    if code not in (0, 10):
        assert result.err
    if roots:
        states = {"absent": "missing", "file": "error"}
        assert [(root["path"], root["state"]) for root in answer["roots"]] == [
            (str(tmp_path / root), states.get(root, "scanned")) for root in roots
        ]


def test_the_answer_names_its_command(refresherr: Refresherr, library: Library) -> None:
    assert refresherr.scan(library.root)["command"] == "scan"


@pytest.mark.parametrize("how", ["missing", "a file"])
def test_the_links_of_a_root_that_is_gone_stay_as_they_were(
    refresherr: Refresherr, library: Library, how: str
) -> None:
    links = [library.link("tv/a.mkv"), library.link("movies/b.mkv")]
    roots = [library.root / "tv", library.root / "movies"]
    refresherr.scan(*roots)
    shutil.rmtree(str(roots[0]))
    if how == "a file":
        make_file(roots[0])
    scan = refresherr.scan(*roots)
    assert (scan["exit_code"], scan["changes"]) == (3, NO_CHANGES)
    assert refresherr.statuses() == named(dict.fromkeys(links, "ok"))


def test_a_dry_run_leaves_the_database_as_it_is(refresherr: Refresherr, library: Library) -> None:
    def files() -> Dict[str, bytes]:
        """SQLite itself leaves an index (-shm) and an empty log when it only reads."""
        found = {str(file): file.read_bytes() for file in refresherr.data_dir.glob("*")}
        return {name: data for name, data in found.items() if data and not name.endswith("-shm")}

    links = library.season("Show", 5)
    counted = ("roots", "totals", "changes", "guard", "mounts", "exit_code")
    preview = refresherr.scan(library.root, "-n")
    assert not refresherr.data_dir.exists()
    done = refresherr.scan(library.root)
    assert [preview[key] for key in counted] == [done[key] for key in counted]

    target_of(links[0]).unlink()
    links[1].unlink()
    library.link("new.mkv")
    before = files()
    preview = refresherr.scan(library.root, "--dry-run")
    assert files() == before
    done = refresherr.scan(library.root)
    assert done["changes"] == {"new": 1, "newly_broken": 1, "recovered": 0, "vanished": 1}
    assert [preview[key] for key in counted] == [done[key] for key in counted]


# Interrupted, killed, locked out


@pytest.fixture
def slow_library(cloud: FuseMount, tmp_path: Path) -> Path:
    """A library of 300 links into 100 folders of a mount that can be made to hang."""
    for number in range(300):
        name = f"{number % 100}/{number}.mkv"
        make_file(tmp_path / "backend" / name)
        make_link(tmp_path / "media" / name, tmp_path / "cloud" / name)
    return tmp_path / "media"


def test_an_interrupted_scan_ends_at_once_and_keeps_what_it_had(
    refresherr: Refresherr, cloud: FuseMount, slow_library: Path
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or the child may ignore it
    begin = cloud.requests()
    process = refresherr.start("scan", "--json", slow_library)
    eventually(lambda: cloud.requests() > begin + 300)
    cloud.hang()  # with the default stat_timeout: nobody gives up by himself in time

    def is_quiet() -> bool:
        before = cloud.requests()
        time.sleep(0.5)
        return cloud.requests() == before

    eventually(is_quiet)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, '"status": "interrupted"' in out) == (130, True), err
    kept = refresherr.statuses()
    assert kept and set(kept.values()) == {"ok"}, refresherr.query(
        "SELECT * FROM symlinks WHERE status <> 'ok'"
    )
    assert refresherr.query("PRAGMA integrity_check") == [("ok",)]
    cloud.heal()
    scan = refresherr.scan(slow_library)
    assert (scan["exit_code"], scan["totals"]["ok"]) == (0, 300)
    assert scan["changes"] == {**NO_CHANGES, "new": 300 - len(kept)}


def test_a_scan_that_is_killed_at_any_moment_does_no_harm(
    refresherr: Refresherr, library: Library
) -> None:
    """Between two kills 50 of 1500 targets go or come back, so that there is much to write."""
    chance = random.Random(2024)
    targets: Dict[str, Path] = {}
    for number in range(1500):
        link = library.link(f"{number % 60}/{number}.mkv")
        targets[str(link)] = target_of(link)
    refresherr.scan(library.root)
    duration, killed = 1.0, 0
    for _ in range(25):
        before = refresherr.statuses()
        for link in chance.sample(sorted(targets), 50):
            target = targets[link]
            target.unlink() if target.exists() else target.write_bytes(b"video")
        truth = {link: "ok" if target.exists() else "broken" for link, target in targets.items()}

        process = refresherr.start("scan", library.root)
        time.sleep(chance.uniform(0.3, 1.0) * duration)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        assert refresherr.query("PRAGMA integrity_check") == [("ok",)]
        for link, status in refresherr.statuses().items():
            assert status in (before[link], truth[link])

        started = time.monotonic()
        scan = refresherr.scan(library.root)
        duration = time.monotonic() - started
        assert refresherr.statuses() == truth
        gone = list(truth.values()).count("broken")
        assert (scan["exit_code"], scan["totals"]["broken"]) == (0, gone)
        # A row and its event are written together or not at all.
        balance = dict(
            refresherr.query(
                "SELECT path, sum(CASE status WHEN 'broken' THEN 1 ELSE -1 END) FROM events "
                "GROUP BY path"
            )
        )
        assert {path for path, count in balance.items() if count} == {
            path for path, status in truth.items() if status == "broken"
        }
        assert set(balance.values()) <= {0, 1}
    assert killed > 10


def test_only_one_scan_at_a_time(
    refresherr: Refresherr, cloud: FuseMount, slow_library: Path
) -> None:
    cloud.hang()
    begin = cloud.requests()
    first = refresherr.start("scan", slow_library)
    eventually(lambda: cloud.requests() > begin)
    for options in ([], ["--lock-wait", "0.3"]):
        scan = refresherr.scan(slow_library, *options)
        assert (scan["exit_code"], scan["status"]) == (5, "locked")
    third = refresherr.start("scan", "--lock-wait", "60", slow_library)
    with pytest.raises(Exception, match="timed out"):
        third.wait(1)
    cloud.heal()
    for process in (first, third):
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_the_lock_dies_with_a_killed_scan(
    refresherr: Refresherr, cloud: FuseMount, slow_library: Path
) -> None:
    """Its worker hangs in the kernel and lives on: it must not hold the lock, nor our pipes."""
    cloud.hang()
    begin = cloud.requests()
    first = refresherr.start("scan", slow_library)
    eventually(lambda: cloud.requests() > begin)
    first.kill()
    first.communicate(timeout=20)
    cloud.heal()
    scan = refresherr.scan(slow_library)
    assert (scan["exit_code"], scan["totals"]["ok"]) == (0, 300)


def pool_that(answer: Callable[..., Any]) -> program.WorkerPool:
    """Return a pool whose workers answer requests of the kind 'ask' so."""
    settings = program.ScanSettings(ignore_defaults=False)
    return program.WorkerPool({"/": "ext4"}, settings, {}, {"ask": answer})


def test_a_worker_that_dies_is_missed() -> None:
    pool = pool_that(lambda looker: os._exit(0))
    with contextlib.closing(pool), pytest.raises(program.RefresherrError, match="unexpectedly"):
        pool.ask_all([("ask",)])


def test_nobody_waits_for_the_answer_whether_a_mount_is_alive() -> None:
    """Seen with rclone: what was asked failed after a while, and the question beside it hung."""

    def answer(looker: program.Looker) -> str:
        looker.slots.touch("/slow")
        time.sleep(looker.limit / 2)
        return "it failed"

    settings = program.ScanSettings(stat_timeout=1.0)
    answerers = {"ask": answer, "alive": lambda looker, mount: time.sleep(60 * looker.limit)}
    pool = program.WorkerPool({"/": "ext4"}, settings, {}, answerers)
    with contextlib.closing(pool):
        began = time.monotonic()
        assert pool.ask_all([("ask",)]) == ["it failed"]
        assert time.monotonic() - began < 30 * settings.stat_timeout


def test_a_bug_in_a_worker_is_heard() -> None:
    pool = pool_that(lambda looker: 1 // 0)
    with contextlib.closing(pool), pytest.raises(RuntimeError, match="ZeroDivisionError"):
        pool.ask_all([("ask",)])
