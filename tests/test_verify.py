"""Reading a little of the files behind good links: what it costs, what it tells, what it leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Callable, Iterator

import pytest
from conftest import Library, Refresherr
from fuse_fs import FuseMount, fuse_available

import refresherr as program


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[FuseMount]:
    reason = fuse_available()
    if reason:
        pytest.skip(reason)
    for name in ("cloud", "backend"):
        (tmp_path / name).mkdir()
    with FuseMount(tmp_path / "cloud", tmp_path / "backend", timeout=0) as mount:
        yield mount


def add(tmp_path: Path, count: int) -> None:
    """Make films on the mount, and links to them."""
    for number in range(count):
        folder = tmp_path / "backend" / f"Film {number}"
        folder.mkdir()
        (folder / "film.mkv").write_bytes(b"v" * 10_000)
        link = tmp_path / "media" / f"Film {number}" / "film.mkv"
        link.parent.mkdir(parents=True)
        link.symlink_to(tmp_path / "cloud" / f"Film {number}" / "film.mkv")


@pytest.mark.parametrize(
    ("size", "most", "chance", "total"),
    [(0, 1000, 0.0, 0), (900, 1000, 0.5, 900), (1 << 20, 1 << 16, 0.0, 1 << 16),
     (1 << 20, 1 << 16, 0.999, 1 << 16)],
)  # fmt: skip
def test_the_places_that_are_read(size: int, most: int, chance: float, total: int) -> None:
    places = program.places_to_read(size, most, chance)
    assert sum(length for _, length in places) == total
    assert all(offset >= 0 and offset + length <= size for offset, length in places)
    assert places[0][0] == 0 and (len(places) == 1 or places[1][0] >= places[0][1])


def test_files_take_turns(refresherr: Refresherr, library: Library) -> None:
    for number in range(6):
        library.link(f"Film {number}/film.mkv")
    refresherr.scan(library.root)
    for _ in range(3):
        result = refresherr("verify", "--json", "--max", 2, library.root).json
        assert (result["read"], result["unreadable"], result["exit_code"]) == (2, 0, 0)
        assert result["bytes"] == 2 * len(b"video")
    assert refresherr.query("SELECT count(*) FROM symlinks WHERE read_utc IS NULL") == [(0,)]


def test_a_file_that_cannot_be_read_is_ok_and_listed(
    refresherr: Refresherr, cloud: FuseMount, tmp_path: Path
) -> None:
    add(tmp_path, 5)
    refresherr.scan(tmp_path / "media")
    cloud.fail_paths({"Film 2/film.mkv": errno.EIO})
    result = refresherr("verify", "--json", tmp_path / "media")
    assert (result.code, result.json["read"], result.json["unreadable"]) == (3, 5, 1)
    (item,) = result.json["items"]
    assert item["path"].endswith("Film 2/film.mkv") and item["error"] and item["since"]
    assert set(refresherr.statuses().values()) == {"ok"}
    shown = refresherr("broken", "--status", "unreadable", "--json").json["links"]
    assert [link["path"] for link in shown] == [item["path"]]
    cloud.heal()
    assert refresherr("verify", "--json", tmp_path / "media").json["unreadable"] == 0


def test_most_of_a_mount_is_the_mount(
    refresherr: Refresherr, cloud: FuseMount, tmp_path: Path
) -> None:
    add(tmp_path, 5)
    refresherr.scan(tmp_path / "media")
    cloud.fail_paths({f"Film {n}/film.mkv": errno.EIO for n in range(4)})
    result = refresherr("verify", "--json", tmp_path / "media")
    assert (result.code, result.json["items"]) == (4, [])
    assert refresherr.query("SELECT count(*) FROM symlinks WHERE read_error IS NOT NULL") == [(0,)]


def test_a_read_that_hangs_does_not_hang_the_run(
    refresherr: Refresherr, cloud: FuseMount, tmp_path: Path, write_config: Callable[[str], Path]
) -> None:
    write_config("[scan]\nstat_timeout = 2s\n")
    add(tmp_path, 5)
    refresherr.scan(tmp_path / "media")
    cloud.hang()
    result = refresherr("verify", "--json", tmp_path / "media")
    assert (result.code, result.json["status"]) == (4, "refused")
    cloud.heal()
    assert os.path.exists(tmp_path / "cloud" / "Film 0")
