"""Libraries of links into real mounts, the outages of these, and what must hold after each scan."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple, Union

import pytest
from conftest import Refresherr
from fuse_fs import FuseMount, fuse_available, tmpfs, tmpfs_available

AGE = 2.2  # seconds after which the state of a directory may be relied on by a later scan


def strings(paths: Iterable[Path]) -> Set[str]:
    return {str(path) for path in paths}


def links_on_disk(folder: Path) -> Dict[str, Tuple[str, int, int]]:
    """Return {path: (text, inode, time of change)} of every link; the same means untouched."""
    found = {}
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:  # os.walk would look at the targets, and hang like them
                if entry.is_symlink():
                    info = entry.stat(follow_symlinks=False)
                    found[entry.path] = (os.readlink(entry.path), info.st_ino, info.st_ctime_ns)
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return found


def take_away(process: subprocess.Popen[str]) -> None:
    """Kill a scan that does not end, without waiting for what hangs in the kernel."""
    process.kill()
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


class Cloud:
    """One mount: a tmpfs, or the project's FUSE over a directory of the local disk.

    `point` is what links say, `backend` where files are made and lost.  What is hidden is
    neither listed nor found, as with a backend whose list is not complete.
    """

    def __init__(self, point: Path, backend: Optional[Path] = None) -> None:
        point.mkdir(parents=True)
        self.point = point
        self.backend = backend or point
        self.hidden: List[str] = []
        self.fs: Union[FuseMount, tmpfs] = tmpfs(point)
        if backend:
            backend.mkdir(parents=True, exist_ok=True)
            self.fs = FuseMount(point, backend, timeout=0)

    @property
    def fuse(self) -> FuseMount:
        assert isinstance(self.fs, FuseMount)
        return self.fs

    def close(self) -> None:
        self.fs.close() if isinstance(self.fs, FuseMount) else self.fs.unmount()

    def hide(self, names: Iterable[object]) -> None:
        """Let these paths below the mount be away until `show`."""
        self.hidden += map(str, names)
        if isinstance(self.fs, FuseMount):
            self.fs.hide(self.hidden)
            return
        for number, name in enumerate(self.hidden):
            aside = self.backend / ".aside" / str(number)
            if not aside.exists():
                aside.parent.mkdir(exist_ok=True)
                (self.backend / name).rename(aside)

    def show(self) -> None:
        """Let all that was hidden be back."""
        hidden, self.hidden = self.hidden, []
        if isinstance(self.fs, FuseMount):
            self.fs.hide([])
            return
        for number, name in enumerate(hidden):
            (self.backend / ".aside" / str(number)).rename(self.backend / name)


class MountedLibrary:
    """A library, the mounts that it leads to, and the links whose targets are gone for good."""

    def __init__(self, folder: Path, refresherr: Refresherr) -> None:
        self.folder = folder
        self.refresherr = refresherr
        self.media = folder / "media"
        self.media.mkdir()
        self.disk = folder / "disk" / "files"
        self.lost: Set[str] = set()
        self.stack = contextlib.ExitStack()
        self.places: List[Tuple[Path, Path]] = []  # a mount point, where its files are made
        self.files: Dict[Path, Path] = {}

    # What there is

    def add_cloud(self, kind: str, name: str = "cloud", where: str = "mnt") -> Cloud:
        """Mount a "tmpfs" or a "fuse"; skips the test where that is not possible."""
        reason = fuse_available() if kind == "fuse" else tmpfs_available()
        if reason:
            pytest.skip(reason)
        backend = self.folder / f"backend of {name}" if kind == "fuse" else None
        # Each in a directory of its own, so that no good target lies beside a mount point.
        cloud = Cloud(self.folder / where / name, backend)
        self.stack.callback(cloud.close)
        cloud.fs.mount()
        self.places.append((cloud.point, cloud.backend))
        return cloud

    def file_of(self, target: Path) -> Path:
        """Return where the file really lies that a link leads to."""
        if target not in self.files:
            self.files[target] = target
            for point, backend in self.places:
                if point in target.parents:
                    self.files[target] = backend / target.relative_to(point)
        return self.files[target]

    def put(self, name: str, target: Path, exists: bool = True) -> Path:
        """Make the link media/NAME and, unless told otherwise, the file that it leads to."""
        if exists:
            file = self.file_of(target)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"video")
        link = self.media / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
        return link

    def films(
        self, where: Path, count: int, name: str = "Film", root: str = "movies"
    ) -> List[Path]:
        """Make films, each a title in a torrent folder of its own below `where`."""
        titles = [f"{name} {number:03d} (2001)" for number in range(count)]
        return [
            self.put(
                f"{root}/{title}/{title}.mkv", where / title.replace(" ", ".") / f"{title}.mkv"
            )
            for title in titles
        ]

    def show(self, where: Path, title: str, episodes: int, root: str = "tv") -> List[Path]:
        """Make a season of one show in one torrent folder below `where`."""
        names = [f"{title} - S01E{number:02d}.mkv" for number in range(1, episodes + 1)]
        release = where / f"{title.replace(' ', '.')}.S01.1080p"
        return [self.put(f"{root}/{title}/Season 01/{name}", release / name) for name in names]

    def shows(self, where: Path, count: int, episodes: int, name: str = "Show") -> List[Path]:
        """Make several shows of one season each."""
        titles = [f"{name} {number:03d}" for number in range(count)]
        return [link for title in titles for link in self.show(where, title, episodes)]

    def local(self, *names: str) -> List[Path]:
        """Make films on the local disk, which has no outages; a good neighbour stays for ever."""
        self.put("local/neighbour/neighbour.mkv", self.disk / "neighbour.mkv")
        return [self.put(f"local/{name}/{name}.mkv", self.disk / f"{name}.mkv") for name in names]

    def target(self, link: Path) -> Path:
        return Path(os.readlink(str(link)))

    # What happens

    def lose(self, links: Iterable[Path], folder: bool = False) -> None:
        """Have the files behind these links gone for good, or the folders that they lie in."""
        for link in links:
            file = self.file_of(self.target(link))
            if not folder:
                file.unlink()
            elif file.parent.exists():
                shutil.rmtree(str(file.parent))
            self.lost.add(str(link))

    def bring_back(self, links: Iterable[Path]) -> None:
        for link in links:
            file = self.file_of(self.target(link))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"video")
            self.lost.discard(str(link))

    def settle(self) -> None:
        """Let all directories be old enough to be relied on."""
        time.sleep(AGE)

    # The program

    def scan(
        self, *args: object, roots: Optional[Sequence[Path]] = None, limit: float = 90
    ) -> Dict[str, Any]:
        """Scan; it must end, call nothing broken that is not lost, and touch no link."""
        before = links_on_disk(self.media)
        process = self.refresherr.start("scan", "--json", *args, *(roots or [self.media]))
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            take_away(process)
            pytest.fail(f"the scan has not ended after {limit:.1f} s")
        assert out, err
        result: Dict[str, Any] = json.loads(out)
        assert "internal error" not in err, err
        assert result["exit_code"] == process.returncode, err
        assert links_on_disk(self.media) == before and before
        wrong = self.having("broken") - self.lost
        assert not wrong, f"{len(wrong)} healthy links called broken, {min(wrong)} is one"
        return result

    def having(self, status: str) -> Set[str]:
        return {path for path, known in self.refresherr.statuses().items() if known == status}

    def all_links(self) -> Set[str]:
        return set(links_on_disk(self.media))

    def assert_held(self, scan: Dict[str, Any], links: Iterable[Path], code: int = 4) -> None:
        """These links, and no others, are unreachable; all else is as it was."""
        assert (self.having("unreachable"), scan["exit_code"]) == (strings(links), code)
        assert scan["changes"]["newly_broken"] == scan["changes"]["recovered"] == 0

    def assert_held_and(
        self, scan: Dict[str, Any], links: Iterable[Path], broken: Iterable[Path]
    ) -> None:
        """The same, with what is broken beside it."""
        assert (self.having("unreachable"), scan["exit_code"]) == (strings(links), 4)
        assert self.having("broken") == strings(broken)

    def assert_over(self, *args: object) -> Dict[str, Any]:
        """The mounts are whole: the next scan calls every loss broken and all else ok."""
        select, rows = "SELECT path, broken_since_utc FROM symlinks", []
        if self.refresherr.db_path.exists():
            rows = self.refresherr.query(select)
        known, old = {path for path, since in rows if since}, {path for path, _ in rows}
        scan = self.scan(*args)
        assert (self.having("broken"), self.having("unreachable")) == (self.lost, set())
        assert self.having("ok") == self.all_links() - self.lost
        assert scan["exit_code"] == 0
        assert not scan["guard"]["tripped"] and not scan["guard"]["held_back"]
        assert scan["changes"] == {
            "new": len(self.all_links() - old),
            "newly_broken": len(self.lost - known),
            "recovered": len((known & self.all_links()) - self.lost),
            "vanished": 0,
        }
        return scan


def states(scan: Dict[str, Any]) -> Dict[str, str]:
    return {mount["mount_point"]: mount["state"] for mount in scan["mounts"]}


def mergerfs_available() -> str:
    """Why no mergerfs can be mounted here; empty when it can."""
    reason = fuse_available()
    return reason or ("" if shutil.which("mergerfs") else "mergerfs is not installed here")


@contextlib.contextmanager
def mergerfs(point: Path, branches: Sequence[Path]) -> Iterator[None]:
    """A real union of these directories, nothing cached."""
    options = "allow_other,cache.attr=0,cache.entry=0,cache.negative_entry=0,cache.readdir=false"
    point.mkdir(parents=True)
    subprocess.run(
        ["mergerfs", "-o", options, ":".join(map(str, branches)), str(point)],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=30,
    )
    try:
        yield
    finally:
        subprocess.call(["umount", "--lazy", str(point)])
