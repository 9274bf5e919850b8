"""Outages of the mount, staged with real file systems: none may ever be read as breakage."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import pytest
from conftest import PROJECT, Refresherr
from fuse_fs import FuseMount, fuse_available, tmpfs, tmpfs_available

NO_CHANGES = {"new": 0, "newly_broken": 0, "recovered": 0, "vanished": 0}
IMPATIENT = "[scan]\nstat_timeout = 2s\n"


def links_on_disk(folder: Path) -> Dict[bytes, Tuple[bytes, int, int]]:
    """Return {path: (text, inode, time of change)} of every link; the same means untouched."""
    found = {}
    pending = [os.fsencode(str(folder))]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:  # os.walk would look at the targets, and hang like them
                if entry.is_symlink():
                    info = entry.stat(follow_symlinks=False)
                    found[entry.path] = (os.readlink(entry.path), info.st_ino, info.st_ctime_ns)
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return found


class Theatre:
    """A library of links into a mount, and what must hold after every scan of it.

    `backend` is where the files really lie: what a FUSE mount mirrors, or a tmpfs itself.
    """

    def __init__(self, folder: Path, refresherr: Refresherr) -> None:
        self.refresherr = refresherr
        self.folder = folder
        self.media = folder / "media"
        # In a directory of its own, so that no good target lies beside the mount point.
        self.mount = folder / "mnt" / "cloud"
        self.backend = self.mount
        self.disk = self.media  # where the links physically lie
        self.lost: Set[str] = set()  # links whose targets are gone for good
        for path in (self.media, self.mount):
            path.mkdir(parents=True)

    def add(self, folder: str, count: int = 1, lost: bool = False, name: str = "e") -> List[Path]:
        """Make links to files that lie in a folder of the mount."""
        links = []
        target_folder = self.backend / folder
        target_folder.mkdir(parents=True, exist_ok=True)
        (self.media / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            link = self.media / folder / f"{name}{number:03d}.mkv"
            link.symlink_to(self.mount / folder / link.name)
            (target_folder / link.name).write_bytes(b"video")
            links.append(link)
        if lost:
            self.lose(links)
        return links

    def add_local(self, name: str, lost: bool = False) -> Path:
        """Make a link to a file on the local disk, which has no outages."""
        target, link = self.folder / "disk" / name, self.media / name
        target.parent.mkdir(exist_ok=True)
        (target.parent / "neighbour").touch()
        link.symlink_to(target)
        target.write_bytes(b"video")
        if lost:
            target.unlink()
            self.lost.add(str(link))
        return link

    def target(self, link: Path) -> Path:
        return self.backend / os.path.relpath(os.readlink(str(link)), str(self.mount))

    def lose(self, links: Iterable[Path]) -> None:
        for link in links:
            self.target(link).unlink()
            self.lost.add(str(link))

    def bring_back(self, links: Iterable[Path]) -> None:
        for link in links:
            self.target(link).write_bytes(b"video")
            self.lost.discard(str(link))

    def scan(self, *args: object, roots: Optional[List[Path]] = None) -> Dict[str, Any]:
        """Scan; the process must end, break nothing that is not lost, and touch no link."""
        before = links_on_disk(self.disk)
        command = ["scan", "--json", *args, *(roots or [self.media])]
        return self.finish(self.refresherr.start(*command), before)

    def finish(
        self, process: subprocess.Popen[str], before: Dict[bytes, Tuple[bytes, int, int]]
    ) -> Dict[str, Any]:
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail("the scan did not end")
        assert out, err
        result: Dict[str, Any] = json.loads(out)
        assert links_on_disk(self.disk) == before and before
        assert self.having("broken") <= self.lost
        assert result["exit_code"] == process.returncode, err
        return result

    def having(self, status: str) -> Set[str]:
        return {path for path, known in self.refresherr.statuses().items() if known == status}

    def state_of(self, scan: Dict[str, Any], point: Optional[Path] = None) -> Optional[str]:
        states = {mount["mount_point"]: mount["state"] for mount in scan["mounts"]}
        return states.get(str(point or self.mount))


def strings(paths: Iterable[Path]) -> Set[str]:
    return {str(path) for path in paths}


@pytest.fixture
def theatre(tmp_path: Path, refresherr: Refresherr) -> Theatre:
    return Theatre(tmp_path, refresherr)


@pytest.fixture
def cloud(theatre: Theatre) -> Iterator[FuseMount]:
    """A FUSE mount under the theatre's library; nothing is cached by the kernel."""
    reason = fuse_available()
    if reason:
        pytest.skip(reason)
    theatre.backend = theatre.folder / "backend"
    theatre.backend.mkdir()
    with FuseMount(theatre.mount, theatre.backend, timeout=0) as mount:
        yield mount


@pytest.fixture
def memory(theatre: Theatre) -> Iterator[tmpfs]:
    """A tmpfs where the library's links lead, not mounted yet."""
    reason = tmpfs_available()
    if reason:
        pytest.skip(reason)
    mount = tmpfs(theatre.mount)
    yield mount
    mount.unmount()


Outage = Callable[[FuseMount], None]
OUTAGES: Dict[str, Tuple[Outage, str]] = {
    "unmounted": (lambda mount: mount.close(), "absent"),
    "killed": (lambda mount: mount.kill(), "error"),
    "EIO everywhere": (lambda mount: mount.fail(errno.EIO, include_root=True), "error"),
    "EACCES everywhere": (lambda mount: mount.fail(errno.EACCES, include_root=True), "error"),
    "EIO below the root": (lambda mount: mount.fail(errno.EIO), "healthy"),
    "backend answers 404": (lambda mount: mount.empty(), "empty"),
    "hung": (lambda mount: mount.hang(), "unresponsive"),
    "frozen": (lambda mount: mount.freeze(), "unresponsive"),
}


def end_outage(mount: FuseMount) -> None:
    """As when a service restarts rclone; the switches of the old daemon are gone with it."""
    mount.close()
    mount.mount()


@pytest.mark.parametrize("outage", sorted(OUTAGES))
def test_an_outage_after_a_good_scan(
    theatre: Theatre, cloud: FuseMount, write_config: Callable[[str], Path], outage: str
) -> None:
    """The rest of the library is judged as ever, and afterwards all is as if nothing had been."""
    write_config(IMPATIENT)
    theatre.add("release", 12)
    (broken,) = theatre.add("release", lost=True, name="old")
    theatre.add("a film", 1)
    chain = theatre.media / "chain.mkv"
    (theatre.folder / "disk").mkdir()
    (theatre.folder / "disk/hop").symlink_to(theatre.mount / "release" / "e000.mkv")
    chain.symlink_to(theatre.folder / "disk/hop")
    local = [theatre.add_local("local 1.mkv"), theatre.add_local("local 2.mkv")]
    good = strings([*theatre.media.glob("*/e*.mkv"), chain])
    scan = theatre.scan()
    assert (scan["exit_code"], theatre.state_of(scan)) == (0, "healthy")
    assert (theatre.having("broken"), theatre.having("ok")) == (
        {str(broken)},
        good | strings(local),
    )
    since = "SELECT path, broken_since_utc FROM symlinks WHERE broken_since_utc IS NOT NULL"
    known = theatre.refresherr.query(since)

    begin_outage, state = OUTAGES[outage]
    begin_outage(cloud)
    (theatre.folder / "disk/local 2.mkv").unlink()
    theatre.lost.add(str(local[1]))
    for newly in (1,) if state == "unresponsive" else (1, 0):  # the former take their time
        scan = theatre.scan("--exit-code")
        assert theatre.having("unreachable") == good | {str(broken)}
        assert (theatre.having("ok"), theatre.having("broken")) == (
            {str(local[0])},
            {str(local[1])},
        )
        assert scan["changes"] == {**NO_CHANGES, "newly_broken": newly}
        assert scan["exit_code"] == (3 if state == "healthy" else 4)
        # A healthy mount need not be listed.
        assert theatre.state_of(scan) in ((None, state) if state == "healthy" else (state,))
        for mount in scan["mounts"]:
            assert bool(mount["reason"]) == (mount["state"] != "healthy")
        assert known[0] in theatre.refresherr.query(since)

    end_outage(cloud)
    scan = theatre.scan()
    assert (scan["exit_code"], scan["changes"]) == (0, NO_CHANGES)
    assert (theatre.having("ok"), theatre.having("broken")) == (
        good | {str(local[0])},
        strings([broken, local[1]]),
    )
    assert known[0] in theatre.refresherr.query(since)
    theatre.bring_back([broken])
    assert theatre.scan()["changes"] == {**NO_CHANGES, "recovered": 1}


@pytest.mark.parametrize("outage", ["killed", "EIO everywhere", "backend answers 404", "hung"])
@pytest.mark.parametrize("count", [3, 60])
def test_the_first_scan_ever_in_an_outage_of_a_mount(
    theatre: Theatre, cloud: FuseMount, write_config: Callable[[str], Path], outage: str, count: int
) -> None:
    write_config(IMPATIENT)
    links = strings(theatre.add("release", count))
    OUTAGES[outage][0](cloud)
    scan = theatre.scan()
    assert theatre.having("unreachable") == links
    assert scan["exit_code"] in ((4,) if outage in ("backend answers 404", "hung") else (3, 4))
    end_outage(cloud)
    scan = theatre.scan()
    assert (theatre.having("ok"), scan["exit_code"]) == (links, 0)
    assert scan["changes"] == NO_CHANGES


@pytest.mark.parametrize("count", [5, 200])
def test_the_first_scan_ever_under_an_absent_mount(
    theatre: Theatre, memory: tmpfs, count: int
) -> None:
    """Nothing is known, nothing is mounted: all there is to see is an empty directory."""
    links = theatre.add("release", count)
    shutil.rmtree(str(theatre.mount / "release"))
    local = theatre.add_local("local.mkv")
    for new in (count + 1, 0):
        scan = theatre.scan()
        assert theatre.having("unreachable") == strings(links)
        assert (theatre.having("ok"), scan["exit_code"]) == ({str(local)}, 4)
        assert scan["changes"] == {**NO_CHANGES, "new": new}
    memory.mount()
    (theatre.mount / "release").mkdir()
    theatre.bring_back(links)
    scan = theatre.scan()
    assert (scan["exit_code"], scan["changes"], theatre.having("unreachable")) == (
        0,
        NO_CHANGES,
        set(),
    )


@pytest.mark.parametrize("count", [3, 60])
def test_an_unmounted_tmpfs(theatre: Theatre, memory: tmpfs, count: int) -> None:
    memory.mount()
    links = theatre.add("release", count)
    assert theatre.scan()["exit_code"] == 0
    memory.unmount()
    for _ in range(2):
        scan = theatre.scan()
        assert (theatre.having("unreachable"), scan["exit_code"]) == (strings(links), 4)
        assert theatre.state_of(scan) == "absent"
    memory.mount()
    (theatre.mount / "release").mkdir()
    theatre.bring_back(links[1:])
    theatre.lost.add(str(links[0]))
    scan = theatre.scan()
    assert scan["changes"] == {**NO_CHANGES, "newly_broken": 1}
    assert (theatre.having("broken"), scan["exit_code"]) == ({str(links[0])}, 0)


@pytest.mark.parametrize("neighbour", [False, True])
def test_an_empty_directory_is_a_mount_point_unless_its_neighbours_live(
    theatre: Theatre, neighbour: bool
) -> None:
    """All lies on the root file system, where neighbours speak for what was good once alone."""
    links = theatre.add("emptied torrent", 3)
    if neighbour:
        theatre.add("living torrent", 1)
        theatre.scan()
    theatre.lose(links)
    scan = theatre.scan()
    status, code = ("broken", 0) if neighbour else ("unreachable", 4)
    assert (theatre.having(status), scan["exit_code"]) == (strings(links), code)


# In the middle of a scan


@pytest.mark.parametrize(
    ("outage", "first"),
    [
        ("unmounted", True),
        ("unmounted", False),
        ("killed", False),
        ("EIO everywhere", False),
        ("backend answers 404", True),
        ("backend answers 404", False),
        ("hung", False),
        ("frozen", True),
    ],
)
def test_an_outage_that_begins_in_the_middle_of_a_scan(
    theatre: Theatre,
    cloud: FuseMount,
    write_config: Callable[[str], Path],
    outage: str,
    first: bool,
) -> None:
    write_config(IMPATIENT)
    for number in range(120):
        theatre.add(f"{number}/release", 2)
    links = strings(theatre.media.glob("*/*/*.mkv"))
    lost: Set[str] = set()
    for number in range(0 if first else 10):  # in both halves of a worker that divides itself
        lost |= strings(theatre.add(f"{number}/release", 1, lost=True, name="lost"))
    cloud.close()
    with FuseMount(theatre.mount, theatre.backend, latency=0.01, timeout=0) as slow:
        if not first:
            theatre.scan()
        before, begin = links_on_disk(theatre.disk), slow.requests()
        process = theatre.refresherr.start("scan", "--json", theatre.media)
        limit = time.monotonic() + 60
        while slow.requests() < begin + 200:
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.005)
        OUTAGES[outage][0](slow)
        scan = theatre.finish(process, before)
        assert scan["exit_code"] == 4
        assert theatre.having("unreachable") and theatre.having("broken") == set()
        assert lost <= theatre.having("unreachable")
        assert theatre.having("unreachable") | theatre.having("ok") == links | lost
    cloud.mount()
    scan = theatre.scan()
    assert (scan["exit_code"], theatre.having("ok"), scan["changes"]) == (0, links, NO_CHANGES)
    assert theatre.having("broken") == lost


@pytest.mark.parametrize("neighbours", [0, 20])
def test_a_single_file_that_hangs_on_a_healthy_mount(
    theatre: Theatre, cloud: FuseMount, write_config: Callable[[str], Path], neighbours: int
) -> None:
    write_config(IMPATIENT)
    (hung,) = theatre.add("release", name="hung")
    good = theatre.add("release", neighbours) + theatre.add("other", 5)
    (broken,) = theatre.add("other", lost=True, name="broken")
    cloud.hang_paths(["release/hung000.mkv"])
    scan = theatre.scan()
    assert (theatre.having("unreachable"), scan["exit_code"]) == ({str(hung)}, 3)
    assert (theatre.having("ok"), theatre.having("broken")) == (strings(good), {str(broken)})
    assert theatre.state_of(scan) == "healthy"
    cloud.heal()
    assert (theatre.scan()["exit_code"], theatre.having("ok")) == (0, strings([*good, hung]))


# The library's own mount


@pytest.mark.parametrize("count", [3, 60])
@pytest.mark.parametrize("where", ["root", "directory", "two roots"])
def test_a_library_directory_that_is_itself_an_absent_mount(
    theatre: Theatre, cloud: FuseMount, where: str, count: int
) -> None:
    """The links lie on the mount here: with it, they vanish from sight, and must not be missing."""
    theatre.disk = theatre.backend
    (theatre.folder / "target").touch()
    for number in range(count):
        (theatre.backend / f"{number}.mkv").symlink_to(theatre.folder / "target")
    roots = [theatre.mount.parent if where == "directory" else theatre.mount]
    if where == "two roots":
        roots.append(theatre.media)
        (theatre.media / "local.mkv").symlink_to(theatre.folder / "target")
    theatre.scan(roots=roots)
    known = theatre.refresherr.statuses()
    assert set(known.values()) == {"ok"} and len(known) >= count
    cloud.close()
    for _ in range(2):
        scan = theatre.scan(roots=roots)
        assert (scan["exit_code"], theatre.refresherr.statuses()) == (4, known)
        assert (scan["changes"], scan["totals"]["missing"]) == (NO_CHANGES, 0)
    cloud.mount()
    scan = theatre.scan(roots=roots)
    assert (scan["exit_code"], scan["changes"]) == (0, NO_CHANGES)
    assert theatre.refresherr.statuses() == known


@pytest.mark.parametrize("outage", ["killed", "EIO everywhere", "hung"])
def test_a_library_directory_on_a_mount_that_is_out_of_order(
    theatre: Theatre, cloud: FuseMount, write_config: Callable[[str], Path], outage: str
) -> None:
    write_config(IMPATIENT)
    theatre.disk = theatre.backend
    (theatre.folder / "target").touch()
    (theatre.media / "local.mkv").symlink_to(theatre.folder / "target")
    for number in range(20):
        (theatre.backend / f"{number}.mkv").symlink_to(theatre.folder / "target")
    roots = [theatre.mount, theatre.media]
    assert theatre.scan(roots=roots)["totals"]["ok"] == 21
    OUTAGES[outage][0](cloud)
    scan = theatre.scan(roots=roots)
    assert (scan["exit_code"], scan["changes"]) == (4, NO_CHANGES)
    assert len(theatre.having("ok")) == 21
    end_outage(cloud)
    assert (theatre.scan(roots=roots)["exit_code"], len(theatre.having("ok"))) == (0, 21)


# Configured checks and remembered mounts


@pytest.mark.parametrize(
    ("check", "state"),
    [
        ("healthy", "healthy"),
        ("absent", "absent"),
        ("not there at all", "absent"),
        ("empty", "empty"),
        ("sentinel", "healthy"),
        ("sentinel missing", "absent"),
    ],
)
def test_mount_checks(
    theatre: Theatre, memory: tmpfs, write_config: Callable[[str], Path], check: str, state: str
) -> None:
    """The first scan ever.  What is not mounted is refused, whatever lies in its place."""
    other = theatre.mount.parent / "other"
    other.mkdir()
    checked = theatre.mount / "online" if "sentinel" in check else theatre.mount
    write_config(f"[scan]\nmount_checks =\n    {checked}\n    {other}\n")
    with tmpfs(other):
        (other / "b.mkv").touch()
        (theatre.media / "other.mkv").symlink_to(other / "b.mkv")
        (theatre.media / "other gone.mkv").symlink_to(other / "gone.mkv")
        theatre.lost.add(str(theatre.media / "other gone.mkv"))
        if check not in ("absent", "not there at all"):
            memory.mount()
        links = theatre.add("release", 3)
        if check == "sentinel":
            (theatre.mount / "online").touch()
        elif check in ("empty", "not there at all"):
            shutil.rmtree(str(theatre.mount / "release"))
            if check != "empty":
                theatre.mount.rmdir()
        elif check == "healthy":
            theatre.lose(links[2:])
        healthy = state == "healthy"
        for _ in range(2):
            scan = theatre.scan()
            bad = set() if healthy else strings(links)
            assert (theatre.having("unreachable"), scan["exit_code"]) == (bad, 0 if healthy else 4)
            assert theatre.having("broken") == theatre.lost
            assert str(theatre.media / "other.mkv") in theatre.having("ok")
            assert theatre.state_of(scan, other) == "healthy"
            states = {mount["state"] for mount in scan["mounts"]}
            assert state in states and (not healthy or states == {"healthy"})


def test_a_sentinel_speaks_for_its_own_directory_only(
    theatre: Theatre, memory: tmpfs, write_config: Callable[[str], Path]
) -> None:
    memory.mount()
    links = theatre.add("one", 3) + theatre.add("two", 3)
    sentinel = theatre.mount / "one" / "online"
    sentinel.touch()
    write_config(f"[scan]\nmount_checks = {sentinel}\n")
    assert theatre.scan()["exit_code"] == 0
    sentinel.unlink()
    theatre.lose([links[0], links[3]])
    scan = theatre.scan()
    assert (theatre.having("unreachable"), scan["exit_code"]) == (strings(links[:3]), 4)
    assert (theatre.having("broken"), theatre.having("ok")) == ({str(links[3])}, strings(links[4:]))
    sentinel.touch()
    assert theatre.scan()["exit_code"] == 0
    assert theatre.having("broken") == strings([links[0], links[3]])


@pytest.mark.parametrize("outage", ["hung", "EIO everywhere"])
@pytest.mark.parametrize("sentinel", [False, True])
def test_a_mount_check_that_gets_no_answer(
    theatre: Theatre,
    cloud: FuseMount,
    write_config: Callable[[str], Path],
    outage: str,
    sentinel: bool,
) -> None:
    links = theatre.add("release", 3)
    (theatre.backend / "online").touch()
    check = theatre.mount / "online" if sentinel else theatre.mount
    write_config(f"{IMPATIENT}mount_checks = {check}\n")
    local = theatre.add_local("local.mkv")
    OUTAGES[outage][0](cloud)
    scan = theatre.scan()
    assert (theatre.having("unreachable"), scan["exit_code"]) == (strings(links), 4)
    assert theatre.having("ok") == {str(local)}
    assert OUTAGES[outage][1] in {mount["state"] for mount in scan["mounts"]}
    cloud.heal()
    assert (theatre.scan()["exit_code"], theatre.having("unreachable")) == (0, set())


@pytest.mark.parametrize("how", ["missing", "EIO", "EACCES", "hung"])
def test_a_sentinel_that_cannot_be_read_speaks_for_its_directory(
    theatre: Theatre, cloud: FuseMount, write_config: Callable[[str], Path], how: str
) -> None:
    """All else looks healthy, but a part of the files is not there: no loss, says the sentinel."""
    links = theatre.add("release", 8)
    sentinel = theatre.backend / "online"
    sentinel.touch()
    write_config(f"{IMPATIENT}mount_checks = {theatre.mount / 'online'}\n")
    assert theatre.scan()["exit_code"] == 0
    for link in links[:4]:
        theatre.target(link).unlink()
    if how == "missing":
        sentinel.unlink()
    elif how == "hung":
        cloud.hang_paths(["online"])
    else:
        cloud.fail_paths({"online": getattr(errno, how)})
    scan = theatre.scan()
    assert (theatre.having("unreachable"), scan["exit_code"]) == (strings(links), 4)
    cloud.heal()
    sentinel.touch()
    theatre.bring_back(links)
    assert (theatre.scan()["changes"], theatre.having("unreachable")) == (NO_CHANGES, set())


def test_another_file_system_in_the_place_of_a_remembered_mount(
    theatre: Theatre, memory: tmpfs
) -> None:
    """Even with all the files there; only `--forget-mount` says that this is meant."""
    memory.mount()
    links = theatre.add("release", 12)
    assert theatre.scan()["exit_code"] == 0
    memory.unmount()
    with tmpfs(theatre.mount, fs_type="ramfs"):
        (theatre.mount / "release").mkdir()
        theatre.bring_back(links[1:])
        theatre.lost.add(str(links[0]))
        for _ in range(2):
            scan = theatre.scan()
            assert (theatre.having("unreachable"), scan["exit_code"]) == (strings(links), 4)
            assert theatre.state_of(scan) not in (None, "healthy")
        assert theatre.scan("--forget-mount", theatre.mount)["exit_code"] == 0
        for _ in range(2):
            assert (theatre.having("ok"), theatre.having("broken")) == (
                strings(links[1:]),
                theatre.lost,
            )
            assert theatre.scan()["exit_code"] == 0


# What an adversary found


MEANWHILE = """
import subprocess, sys
sys.path.insert(0, {project!r})
import refresherr
visit = refresherr.ANSWERERS["visit"]
def visit_and_meddle(looker, directory, *noted):
    if directory.endswith("/060"):
        subprocess.check_call(["umount", "--lazy", {mount!r}])
    found = visit(looker, directory, *noted)
    if directory.endswith("/060") and {back!r}:
        subprocess.check_call(["mount", "--bind", {backend!r}, {mount!r}])
    return found
refresherr.ANSWERERS["visit"] = visit_and_meddle
look, meddled = refresherr.Watch.look, []
def look_and_meddle(self, *paths):
    second_look = {again!r} and not meddled
    if second_look:
        meddled.append(subprocess.check_call(["umount", "--lazy", {mount!r}]))
    found = look(self, *paths)
    if second_look:
        subprocess.check_call(["mount", "--bind", {backend!r}, {mount!r}])
    return found
refresherr.Watch.look = look_and_meddle
sys.exit(refresherr.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("back", "again"), [(True, False), (False, False), (True, True)])
def test_a_mount_that_goes_while_one_directory_is_walked(
    theatre: Theatre, memory: tmpfs, back: bool, again: bool
) -> None:
    """The real program and a real mount; only the moment is chosen, by wrapping one method."""
    memory.unmount()
    (theatre.mount / "stray file").touch()  # no help from an empty mount point
    theatre.backend = theatre.folder / "backend"
    for number in range(100):
        theatre.add(f"{number:03d}", 3)
    mount = ["mount", "--bind", str(theatre.backend), str(theatre.mount)]
    subprocess.check_call(mount)
    try:
        assert theatre.scan()["exit_code"] == 0
        places = {"mount": str(theatre.mount), "backend": str(theatre.backend)}
        script = MEANWHILE.format(project=str(PROJECT), back=back, again=again, **places)
        before = links_on_disk(theatre.disk)
        command = theatre.refresherr.command("scan", "--json", theatre.media)[2:]
        process = subprocess.Popen(
            [sys.executable, "-c", script, *command],
            env=theatre.refresherr.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        scan = theatre.finish(process, before)
        assert (scan["exit_code"], scan["totals"]["broken"]) == (0 if back else 4, 0)
        if not back:
            subprocess.check_call(mount)
        assert theatre.scan()["totals"]["ok"] == 300
    finally:
        subprocess.call(["umount", "--lazy", str(theatre.mount)])
