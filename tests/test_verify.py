"""Verify: a little of each file is read, in turns, within bounds, and judges no link."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from conftest import Library, Refresherr
from fake_servers import FakeRadarr
from fuse_fs import FuseMount, fuse_available

import refresherr as program

MIB = 1 << 20
HUNG = "stat_timeout = 1s"


@pytest.mark.parametrize(
    ("size", "max_bytes", "chance", "places"),
    [
        (0, MIB, 0.5, [(0, 0)]),
        (1000, MIB, 0.5, [(0, 1000)]),
        (MIB, MIB, 0.5, [(0, MIB)]),
        (2 * MIB, MIB, 0.0, [(0, MIB // 2), (MIB // 2, MIB // 2)]),
        (2 * MIB, MIB, 0.999999, [(0, MIB // 2), (3 * MIB // 2, MIB // 2)]),
        (10**9, 8191, 0.5, [(0, 8191)]),
        (10**9, 1, 0.5, [(0, 1)]),
    ],
)
def test_which_places_are_read(
    size: int, max_bytes: int, chance: float, places: List[Tuple[int, int]]
) -> None:
    assert program.places_to_read(size, max_bytes, chance) == places


def test_places_stay_within_the_file_and_the_bound() -> None:
    for size in (MIB + 1, MIB + 4095, 3 * MIB + 7, 10**9 + 1):
        for chance in (0.0, 0.3, 0.7, 0.999999):
            (_, head), (offset, length) = program.places_to_read(size, MIB, chance)
            assert head <= offset <= offset + length <= size and head + length <= MIB


GOOD, BAD = ("/m", "", 5), ("/m", "Input/output error", 0)


@pytest.mark.parametrize(
    ("tries", "sealed", "blamed"),
    [
        ([GOOD] * 3 + [BAD], {}, False),
        ([GOOD] * 2 + [BAD] * 2, {}, False),  # half of them are not most
        ([GOOD] * 2 + [BAD] * 3, {}, True),
        ([BAD], {}, True),  # one alone cannot tell the file from its mount
        ([GOOD] * 9 + [BAD], {"/m": ("unresponsive", "/m hangs")}, True),
        ([("", "no link", 0)] * 3, {}, False),
        ([BAD] + [("/n", "", 5)] * 9, {}, True),  # what another mount does is no help
    ],
)
def test_which_mounts_are_to_blame(tries: Any, sealed: Any, blamed: bool) -> None:
    assert list(program.blame_mounts(tries, sealed)) == ["/m"] * blamed


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("512K", 524288), ("1M", MIB), ("1 MiB", MIB), ("2gb", 2 << 30)]
)
def test_sizes(text: str, size: int) -> None:
    assert program.parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "", "-1", "1T", "1.5M", "M"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="512K"):
        program.parse_size(text)


class Cloud(Library):
    """Films on a FUSE mount, 2 MiB each."""

    fs: FuseMount
    source: Path

    def film(self, number: int) -> Path:
        name = f"Film {number} (2020).mkv"
        with open(self.source / name, "wb") as file:
            file.truncate(2 * MIB)
        (self.root / name).symlink_to(self.mount / name)
        return self.root / name


@pytest.fixture
def cloud(tmp_path: Path, write_config: Callable[[str], Path]) -> Iterator[Cloud]:
    if fuse_available():
        pytest.skip(fuse_available())
    cloud = Cloud(tmp_path)
    cloud.source = tmp_path / "source"
    cloud.source.mkdir()
    write_config(f"[scan]\nroots = {cloud.root}\n{HUNG}\n")
    with FuseMount(cloud.mount, cloud.source, latency=0.005) as cloud.fs:
        yield cloud


def verify(refresherr: Refresherr, *args: object) -> Tuple[int, Dict[str, Any]]:
    result = refresherr("verify", "--json", *args)
    assert result.out, result.err
    return result.code, result.json


def tried(refresherr: Refresherr) -> List[str]:
    rows = refresherr.query("SELECT path FROM symlinks WHERE read_utc IS NOT NULL ORDER BY path")
    return [path for (path,) in rows]


def age(refresherr: Refresherr) -> None:
    """Have all that was done until now lie an hour back."""
    conn = sqlite3.connect(str(refresherr.db_path))
    with conn:
        earlier = "strftime('%Y-%m-%dT%H:%M:%S+00:00', read_utc, '-1 hour')"
        conn.execute(f"UPDATE symlinks SET read_utc = {earlier} WHERE read_utc IS NOT NULL")
    conn.close()


@pytest.mark.parametrize("bound", [16384, 256 << 10, MIB])
def test_no_more_is_read_than_allowed(refresherr: Refresherr, cloud: Cloud, bound: int) -> None:
    for number in range(10):
        cloud.film(number)
    refresherr.scan()
    before = cloud.fs.bytes_read()
    code, result = verify(refresherr, "--max-bytes", bound)
    assert (code, result["read"], result["unreadable"], result["items"]) == (0, 10, 0, [])
    assert result["bytes"] == 10 * bound
    assert cloud.fs.bytes_read() - before == 10 * bound


def test_what_cannot_be_read_is_told_and_stays_good(refresherr: Refresherr, cloud: Cloud) -> None:
    films = [cloud.film(number) for number in range(5)]
    refresherr.scan()
    cloud.fs.fail_reads({films[2].name: errno.EIO})
    code, result = verify(refresherr)
    assert (code, result["read"], result["unreadable"]) == (3, 5, 1)
    (item,) = result["items"]
    assert item["path"] == str(films[2]) and item["error"] == "Input/output error"
    assert item["target"] == os.readlink(films[2])
    assert set(refresherr.statuses().values()) == {"ok"}
    (link,) = refresherr("broken", "--status", "unreadable", "--json").json["links"]
    assert link["path"] == str(films[2])
    age(refresherr)
    assert verify(refresherr)[1]["items"] == [item]  # since the same time
    refresherr.scan("--full")  # the scan knows nothing of this
    assert refresherr("broken", "--status", "unreadable", "--json").json["count"] == 1
    cloud.fs.heal()
    age(refresherr)
    assert verify(refresherr)[0] == 0
    assert refresherr("broken", "--status", "unreadable", "--json").json["count"] == 0


def test_another_target_is_another_file(refresherr: Refresherr, cloud: Cloud) -> None:
    films = [cloud.film(number) for number in range(3)]
    refresherr.scan()
    cloud.fs.fail_reads({films[0].name: errno.EIO})
    assert verify(refresherr)[0] == 3
    films[0].unlink()
    films[0].symlink_to(cloud.mount / films[1].name)
    refresherr.scan()
    assert tried(refresherr) == sorted(map(str, films[1:]))
    assert refresherr("broken", "--status", "unreadable", "--json").json["count"] == 0


def test_a_hang_costs_its_file_alone(refresherr: Refresherr, cloud: Cloud) -> None:
    films = [cloud.film(number) for number in range(12)]
    refresherr.scan()
    cloud.fs.hang_reads([films[3].name])
    began = time.monotonic()
    code, result = verify(refresherr)
    assert time.monotonic() - began < 15
    assert (code, result["read"], [i["path"] for i in result["items"]]) == (3, 12, [str(films[3])])
    assert "did not answer within 1.0s" in result["items"][0]["error"]
    assert len(tried(refresherr)) == 12
    assert set(refresherr.statuses().values()) == {"ok"}


@pytest.mark.parametrize("trouble", ["hang", "fail", "gone"])
def test_a_mount_is_to_blame(refresherr: Refresherr, cloud: Cloud, trouble: str) -> None:
    films = [cloud.film(number) for number in range(6)]
    refresherr.scan()
    if trouble == "hang":
        cloud.fs.hang()
    elif trouble == "fail":
        cloud.fs.fail_reads({film.name: errno.EIO for film in films[:4]})
    else:
        cloud.fs.close()
    code, result = verify(refresherr)
    assert (code, result["read"], result["items"]) == (4, 6, [])
    assert str(cloud.mount) in result["message"]
    assert refresherr.query("SELECT count(*) FROM symlinks WHERE read_error <> ''") == [(0,)]
    assert len(tried(refresherr)) == 6
    assert set(refresherr.statuses().values()) == {"ok"}


def test_they_take_turns_those_that_fail_as_well(refresherr: Refresherr, cloud: Cloud) -> None:
    films = [cloud.film(number) for number in range(6)]
    refresherr.scan()
    cloud.fs.fail_reads({films[0].name: errno.EIO})
    seen: List[str] = []
    for _ in range(2):
        _, result = verify(refresherr, "--max", 3)
        assert result["read"] == 3
        fresh = [path for path in tried(refresherr) if path not in seen]
        assert len(fresh) == 3
        seen += fresh
        age(refresherr)
    assert seen == sorted(map(str, films))
    _, result = verify(refresherr, "--max", 3)
    assert [item["path"] for item in result["items"]] == [str(films[0])]


def test_its_bounds_and_the_scratch_copy(refresherr: Refresherr, cloud: Cloud) -> None:
    films = [cloud.film(number) for number in range(3)]
    refresherr.scan()
    cloud.fs.fail_reads({films[0].name: errno.EIO})
    assert verify(refresherr, "-n")[1]["unreadable"] == 1
    assert tried(refresherr) == []
    assert verify(refresherr, "/nowhere")[1]["read"] == 0
    assert verify(refresherr, "--time-limit", "0.000001")[1]["read"] == 0
    assert refresherr("verify", "--max-bytes", "0").code == 2


def test_what_is_no_file_is_not_counted(refresherr: Refresherr, library: Library) -> None:
    library.link("Film (2020).mkv")
    gone = library.link("Gone (2020).mkv")
    (library.mount / "folder").mkdir()
    (library.root / "folder").symlink_to(library.mount / "folder")
    os.mkfifo(library.mount / "pipe")
    (library.root / "pipe.mkv").symlink_to(library.mount / "pipe")
    refresherr.scan(library.root)
    gone.unlink()
    code, result = verify(refresherr)
    assert (code, result["read"], result["bytes"], result["items"]) == (0, 1, 5, [])


def test_a_run_reads_if_told_so(
    refresherr: Refresherr, cloud: Cloud, write_config: Callable[[str], Path]
) -> None:
    films = [cloud.film(number) for number in range(5)]
    assert refresherr("run", "--json").json["verify"]["status"] == "skipped"
    cloud.fs.fail_reads({films[0].name: errno.EIO})
    settings = f"[scan]\nroots = {cloud.root}\n[verify]\nfiles = 3\nrepair = yes\n"
    write_config(settings)
    result = refresherr("run", "--json").json
    assert (result["exit_code"], result["verify"]["read"]) == (3, 3)
    assert [item["path"] for item in result["verify"]["items"]] == [str(films[0])]
    assert set(refresherr.statuses().values()) == {"ok"}
    assert "verify" in refresherr("run").out


# What counts as broken because it cannot be read: only if asked for, and read again


def let_days_pass(refresherr: Refresherr, days: float = 1.1) -> None:
    """Have what was found unreadable been so since some days ago."""
    moment = program.format_time(time.time() - days * program.DAY)
    with contextlib.closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
        conn.execute("UPDATE symlinks SET first_seen_utc = ?", (moment,))
        update = "UPDATE symlinks SET unreadable_since_utc = ? WHERE read_error <> ''"
        conn.execute(update, (moment,))


@pytest.fixture
def server(cloud: Cloud, write_config: Callable[[str], Path]) -> Iterator[FakeRadarr]:
    with FakeRadarr(cloud.root, api_key="k" * 32) as server:
        for number in range(6):
            name = f"Film {number} (2020).mkv"
            server.add_movie(f"Film {number}", 2020, file_name=name)
            folder = cloud.root / f"Film {number} (2020)"
            folder.mkdir(exist_ok=True)
            cloud.film(number).rename(folder / name)
        yield server


def configure(
    write_config: Callable[[str], Path], cloud: Cloud, server: FakeRadarr, repair: str
) -> None:
    write_config(
        f"[scan]\nroots = {cloud.root}\n{HUNG}\n[verify]\nrepair = {repair}\n"
        "[repair]\nmin_age = 0\npatience = 0\n"
        f"[radarr hd]\nurl = {server.url}\napi_key = {server.api_key}\nroots = {cloud.root}\n"
    )


def test_what_fails_for_a_day_is_repaired_if_asked_for(
    refresherr: Refresherr, cloud: Cloud, server: FakeRadarr, write_config: Callable[[str], Path]
) -> None:
    configure(write_config, cloud, server, "yes")
    refresherr.scan()
    refresherr("ingest")
    bad = cloud.root / "Film 2 (2020)" / "Film 2 (2020).mkv"
    cloud.fs.fail_reads({bad.name: errno.EIO})

    def queued() -> List[str]:
        result = refresherr("queue", "--json").json
        return [action["related_path"] for action in result["queued"]]

    for _ in range(4):  # as often as may be within a day
        assert verify(refresherr)[1]["unreadable"] == 1
    assert queued() == []
    let_days_pass(refresherr)
    assert queued() == []
    verify(refresherr)
    configure(write_config, cloud, server, "no")
    assert queued() == []
    configure(write_config, cloud, server, "yes")
    cloud.fs.heal()  # it is read again, at last
    assert queued() == []
    cloud.fs.fail_reads({f"Film {number} (2020).mkv": errno.EIO for number in range(6)})
    result = refresherr("queue", "--json")
    assert (result.code, result.json["queued"]) == (4, [])  # it is the mount
    cloud.fs.fail_reads({bad.name: errno.EIO})
    (link,) = refresherr("broken", "--status", "unreadable", "--json").json["links"]
    assert link["next"] == "queue has radarr_hd replace the file"
    assert queued() == [str(bad)]
    others = sorted(set(cloud.root.glob("*/*.mkv")) - {bad})

    cloud.fs.heal()
    preview = refresherr("dispatch", "--apply", "--no-wait", "--json").json
    assert (preview["cancelled"], bad.is_symlink()) == (1, True)  # it can be read by now
    cloud.fs.fail_reads({bad.name: errno.EIO})
    assert queued() == [str(bad)]
    result = refresherr("dispatch", "--apply", "--no-wait", "--json").json
    assert (result["sent"], result["failed"]) == (1, 0)
    assert not os.path.lexists(str(bad))
    assert sorted(cloud.root.glob("*/*.mkv")) == others
    assert [command["name"] for command in server.commands.values()] == ["MoviesSearch"]
    again = refresherr("dispatch", "--apply", "--no-wait", "--json").json  # before any scan
    assert (again["repaired"], again["actions"]) == (0, [])


def unreadable_for_days(refresherr: Refresherr) -> None:
    """Have three passes over more than a day, and read of all."""
    for _ in range(3):
        verify(refresherr)
        let_days_pass(refresherr)
        age(refresherr)
    verify(refresherr)


@pytest.mark.parametrize("trouble", ["denied", "slow", "denied at last", "slow at last"])
def test_what_tells_of_no_file_lets_none_go(
    refresherr: Refresherr,
    cloud: Cloud,
    server: FakeRadarr,
    write_config: Callable[[str], Path],
    trouble: str,
) -> None:
    configure(write_config, cloud, server, "yes")
    refresherr.scan()
    refresherr("ingest")
    bad = cloud.root / "Film 2 (2020)" / "Film 2 (2020).mkv"

    def begin() -> None:
        cloud.fs.heal()
        if trouble.startswith("denied"):
            cloud.fs.fail_reads({bad.name: errno.EACCES})
        else:
            cloud.fs.hang_reads([bad.name])

    if trouble.endswith("last"):
        cloud.fs.fail_reads({bad.name: errno.EIO})
    else:
        begin()
    unreadable_for_days(refresherr)
    assert refresherr("broken", "--status", "unreadable", "--json").json["count"] == 1
    begin()
    assert refresherr("queue", "--json").json["queued"] == []
    cloud.fs.heal()
    cloud.fs.fail_reads({bad.name: errno.EIO})
    queued = refresherr("queue", "--json").json["queued"]
    assert len(queued) == trouble.endswith("last")
    begin()
    refresherr("dispatch", "--apply", "--no-wait", "--json")
    assert bad.is_symlink() and not server.commands


def test_the_files_of_its_own_mount_are_asked(
    refresherr: Refresherr, cloud: Cloud, server: FakeRadarr, write_config: Callable[[str], Path]
) -> None:
    """What was read last may all lie elsewhere, and cannot tell of this mount."""
    configure(write_config, cloud, server, "yes")
    for number in range(30):
        local = cloud.mount.parent / f"Other {number}.mkv"
        local.write_bytes(b"video")
        (cloud.root / f"Other {number}.mkv").symlink_to(local)
    refresherr.scan()
    refresherr("ingest")
    bad = cloud.root / "Film 2 (2020)" / "Film 2 (2020).mkv"
    cloud.fs.fail_reads({bad.name: errno.EIO})
    unreadable_for_days(refresherr)
    with contextlib.closing(sqlite3.connect(str(refresherr.db_path))) as conn, conn:
        later = program.format_time(time.time() + 60)
        conn.execute("UPDATE symlinks SET read_utc = ? WHERE path LIKE '%Other%'", (later,))
    result = refresherr("queue", "--json")
    queued = [action["related_path"] for action in result.json["queued"]]
    assert (result.code, queued) == (0, [str(bad)])


def test_an_absent_mount_is_to_blame_not_the_disk_above_it() -> None:
    class Away:
        sealed = {"/mnt/cloud": ("absent", "/mnt/cloud is not mounted")}

        def locate(self, path: str) -> program.Location:
            return program.Location(path, "/", None, 1, sealed="/mnt/cloud")

    away: Any = Away()
    tries = [program.read_some(away, f"/media/{n}.mkv", MIB) for n in range(2)]
    good = [("/", "", 5)] * 9
    assert list(program.blame_mounts([*tries, *good], away.sealed)) == ["/mnt/cloud"]


def test_a_link_that_leads_elsewhere_since_has_not_failed(
    refresherr: Refresherr, cloud: Cloud, server: FakeRadarr, write_config: Callable[[str], Path]
) -> None:
    configure(write_config, cloud, server, "yes")
    refresherr.scan()
    refresherr("ingest")
    bad = cloud.root / "Film 2 (2020)" / "Film 2 (2020).mkv"
    cloud.fs.fail_reads({bad.name: errno.EIO})
    unreadable_for_days(refresherr)
    assert len(refresherr("queue", "--json").json["queued"]) == 1
    with open(cloud.source / "Film 2 (2020) again.mkv", "wb") as file:
        file.truncate(2 * MIB)
    bad.unlink()
    bad.symlink_to(cloud.mount / "Film 2 (2020) again.mkv")
    cloud.fs.fail_reads({"Film 2 (2020) again.mkv": errno.EIO})  # for the first time
    refresherr("dispatch", "--apply", "--no-wait", "--json")
    assert bad.is_symlink() and not server.commands
