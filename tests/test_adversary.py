"""What once called healthy links broken, or forgot what was lost: each a case from a terminal."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Dict, Iterator

import pytest
from conftest import Refresherr
from fuse_fs import tmpfs, tmpfs_available
from mounted_library import AGE, mergerfs_available

needs_tmpfs = pytest.mark.skipif(bool(tmpfs_available()), reason=str(tmpfs_available()))
needs_mergerfs = pytest.mark.skipif(bool(mergerfs_available()), reason=str(mergerfs_available()))
pytestmark = needs_tmpfs


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "mount"
    point.mkdir()
    made = tmpfs(point)
    made.mount()
    yield point
    made.unmount()


def link(path: Path, target: Path, is_folder: bool = False) -> Path:
    """Make a file, or a folder with one in it, and a link to it."""
    file = target / "video.mkv" if is_folder else target
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"video")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    path.symlink_to(target)
    return path


def link_shows(tmp_path: Path, mount: Path, count: int) -> Path:
    """Make a library of shows of one episode, each in a folder of its own on the mount."""
    media = tmp_path / "media"
    for number in range(count):
        link(media / f"Show {number}/e.mkv", mount / f"shows/Show {number}/e.mkv")
    return media


def statuses(refresherr: Refresherr) -> Dict[str, str]:
    with closing(sqlite3.connect(str(refresherr.db_path))) as conn:
        return dict(conn.execute("SELECT path, status FROM symlinks"))


def counts(refresherr: Refresherr) -> Counter[str]:
    return Counter(statuses(refresherr).values())


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_many_works_side_by_side_into_one_directory_are_many_titles(
    mount: Path, tmp_path: Path, refresherr: Refresherr, is_folder: bool, whole: bool
) -> None:
    """Below a root that holds films and shows, a flat folder of films; the mount's is flat, too."""
    media, end = tmp_path / "media", "" if is_folder else ".mkv"
    for number in range(20):
        link(media / f"tv/Show {number}/e.mkv", mount / f"shows/Show {number}/e.mkv")
    for number in range(60):
        name = f"Film {number} ({1950 + number}){end}"
        link(media / "movies" / name, mount / "movies" / name, is_folder)
    assert refresherr("scan", media).code == 0
    (mount / ".away").mkdir()
    names = sorted(os.listdir(str(mount / "movies")))
    for name in names if whole else names[:30]:
        (mount / "movies" / name).rename(mount / ".away" / name)
    assert refresherr("scan", media).code == 4
    assert counts(refresherr)["broken"] == 0


def test_what_was_accepted_is_not_believed_of_another_target(
    mount: Path, tmp_path: Path, refresherr: Refresherr
) -> None:
    media = link_shows(tmp_path, mount, 40)
    refresherr("scan", media)
    for number in range(20):
        shutil.rmtree(str(mount / f"shows/Show {number}"))
    assert refresherr("scan", media).code == 4
    refresherr("scan", media, "--accept", mount / "shows")
    assert counts(refresherr)["broken"] == 20
    for number in range(20):  # repaired, and away before a scan has seen that
        link(media / f"Show {number}/e.mkv", mount / f"new/Show {number}/e.mkv")
    (mount / "new").rename(mount / ".new")
    assert refresherr("scan", media).code == 4
    assert counts(refresherr)["broken"] == 0


def test_library_folders_that_are_gone_speak_for_no_place(
    mount: Path, tmp_path: Path, refresherr: Refresherr
) -> None:
    media = link_shows(tmp_path, mount, 4)
    for number in range(100):
        link(media / f"Film {number}/f.mkv", mount / f"movies/Film {number}/f.mkv")
    refresherr("scan", media)
    for number in range(2):
        shutil.rmtree(str(media / f"Show {number}"))
    refresherr("scan", media)
    for number in range(4):
        shutil.rmtree(str(mount / f"shows/Show {number}"))
    assert refresherr("scan", media).code == 4
    assert counts(refresherr)["broken"] == 0


def test_links_that_vanish_in_mass_are_held_until_they_are_accepted(
    tmp_path: Path, refresherr: Refresherr
) -> None:
    """Their folders stay: nothing in these changes any more."""
    media = tmp_path / "media"
    media.mkdir()
    disk = tmpfs(media)
    disk.mount()
    try:
        links = [link(media / f"Show {n // 3}/{n}.mkv", tmp_path / f"files/{n}") for n in range(24)]
        time.sleep(AGE)
        refresherr("scan", media)
        for path in links[:18]:
            path.unlink()
        time.sleep(AGE)
        assert [refresherr("scan", media).code for _ in range(3)] == [4, 4, 4]
        assert refresherr("scan", media, "--accept", media).code == 0
        assert counts(refresherr) == {"ok": 6, "missing": 18}
    finally:
        disk.unmount()


@needs_mergerfs
def test_a_branch_of_a_union_within_a_union(
    mount: Path, tmp_path: Path, refresherr: Refresherr
) -> None:
    media, disk, spare = (tmp_path / name for name in ("media", "disk", "spare"))
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    for folder in (disk, spare, inner, outer):
        folder.mkdir()
    for number in range(200):
        file = f"shows/S{number}/e.mkv"
        link(media / f"Show {number}/e.mkv", (mount if number < 8 else disk) / file)
        (media / f"Show {number}/e.mkv").unlink()
        (media / f"Show {number}/e.mkv").symlink_to(outer / file)
    (spare / "shows").mkdir()
    options = "cache.attr=0,cache.entry=0,cache.negative_entry=0"
    try:
        for branches, point in ((f"{mount}:{disk}", inner), (f"{inner}:{spare}", outer)):
            subprocess.run(["mergerfs", "-o", options, branches, str(point)], check=True)
        assert refresherr("scan", media).code == 0
        subprocess.run(["umount", "-l", str(mount)], check=True)
        assert refresherr("scan", media).code == 4
        assert counts(refresherr)["broken"] == 0
    finally:
        for point in (outer, inner):
            subprocess.run(["umount", "-l", str(point)], check=False)


@needs_mergerfs
def test_a_branch_of_a_union_of_which_only_a_directory_is_mounted(
    mount: Path, tmp_path: Path, refresherr: Refresherr
) -> None:
    """A container is often given a directory of the union, in which there is no `.mergerfs`."""
    media, disk, union, inside = (tmp_path / n for n in ("media", "disk", "union", "inside"))
    for folder in (disk, union, inside):
        folder.mkdir()
    for number in range(200):
        name, branch = f"shows/S{number}/e.mkv", mount if number < 8 else disk
        link(media / f"Show {number}/e.mkv", branch / name)
        (media / f"Show {number}/e.mkv").unlink()
        (media / f"Show {number}/e.mkv").symlink_to(inside / name[len("shows/") :])
    options = "cache.attr=0,cache.entry=0,cache.negative_entry=0"
    try:
        subprocess.run(["mergerfs", "-o", options, f"{mount}:{disk}", str(union)], check=True)
        subprocess.run(["mount", "--bind", str(union / "shows"), str(inside)], check=True)
        assert refresherr("scan", media).code == 0
        subprocess.run(["umount", "-l", str(mount)], check=True)
        assert refresherr("scan", media).code == 4
        assert counts(refresherr)["broken"] == 0
    finally:
        for point in (inside, union):
            subprocess.run(["umount", "-l", str(point)], check=False)


def test_a_known_loss_is_not_repaired_while_its_whole_folder_is_away(
    mount: Path, tmp_path: Path, refresherr: Refresherr
) -> None:
    """It had come back, before the provider's folder went: no scan has seen either."""
    media = tmp_path / "media"
    for number in range(40):
        name = f"Show {number}/Season 01/Show {number} - S01E01.mkv"
        link(media / name, mount / f"shows/Show.{number}/e.mkv")
    for number in range(40):  # the folders that are asked for a witness: the first by name
        link(media / f"Film {number} (2001)/Film.mkv", mount / f"movies/Film.{number}/f.mkv")
    refresherr("scan", media)
    (mount / "shows/Show.0").rename(mount / "away")
    refresherr("scan", media)
    assert counts(refresherr)["broken"] == 1
    (mount / "away").rename(mount / "shows/Show.0")
    (mount / "shows").rename(mount / "away")
    relay = {"RELAY_BASE": "http://127.0.0.1:1", "RELAY_TOKEN": "x", "ROUTE_MAP": f"{media}=tv"}
    found = refresherr("queue", "--min-age", "0", "--json", env={"SCAN_ROOTS": str(media), **relay})
    assert (found.json["queued"], found.json["skipped"]["unreachable"]) == ([], 1)


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_scan_of_one_root_does_not_trust_what_it_has_not_looked_at(
    mount: Path, tmp_path: Path, refresherr: Refresherr, configured: bool, is_whole: bool
) -> None:
    """A provider's folder, or half of the list, is away; of it, one root has a few titles only."""
    one, other = tmp_path / "one", tmp_path / "other"
    few = 2 if is_whole else 8
    mine = [link(one / f"Kid {n}" / "k.mkv", mount / f"shows/Kid.{n}/k.mkv") for n in range(few)]
    for number in range(160):
        link(other / f"Show {number}" / "k.mkv", mount / f"shows/Show.{number}/k.mkv")
        link(other / f"Film {number}" / "k.mkv", mount / f"movies/Film.{number}/k.mkv")
    if configured:
        refresherr.env["SCAN_ROOTS"] = f"{one},{other}"
    assert refresherr.scan(one, other)["exit_code"] == 0
    hidden = mount / ".hidden"
    if is_whole:
        (mount / "shows").rename(hidden)
    else:
        hidden.mkdir()
        names = [f"Kid.{n}" for n in range(few)] + [f"Show.{n}" for n in range(80)]
        for name in names:
            (mount / "shows" / name).rename(hidden / name)
    for roots in ((one,), (one,), (one, other)):
        assert refresherr.scan(*roots)["exit_code"] == 4
        assert "broken" not in counts(refresherr)
    if is_whole:
        hidden.rename(mount / "shows")
    else:
        for name in names:
            (hidden / name).rename(mount / "shows" / name)
    assert refresherr.scan(one, other)["exit_code"] == 0
    assert set(statuses(refresherr).values()) == {"ok"}
    (mount / "shows/Kid.0/k.mkv").unlink()
    assert refresherr.scan(one)["exit_code"] == 0
    assert statuses(refresherr)[str(mine[0])] == "broken"
