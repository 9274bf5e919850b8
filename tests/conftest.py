"""What all tests share: the program as a process, libraries of real links, real mounts."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import py_compile
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional
from unittest import mock

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PROGRAM = PROJECT / "refresherr.py"
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]


class Result(NamedTuple):
    """What a run of the program left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Dict[str, Any]:
        result: Dict[str, Any] = json.loads(self.out)
        return result


@functools.lru_cache(maxsize=None)
def compiled_program() -> Path:
    """Compile the program once: for who runs it many times, that is most of what a run costs."""
    folder = tempfile.mkdtemp(prefix="refresherr-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = Path(folder) / "refresherr.pyc"
    py_compile.compile(str(PROGRAM), cfile=str(file), doraise=True)
    return file


class Refresherr:
    """The program, with a data directory of its own and nothing of ours in its environment."""

    def __init__(self, folder: Path) -> None:
        self.program = compiled_program()
        self.data_dir = folder / "data"
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}

    @property
    def db_path(self) -> Path:
        return self.data_dir / "symlinks.db"

    def command(self, *args: object) -> List[str]:
        return [
            sys.executable,
            str(self.program),
            "--data-dir",
            str(self.data_dir),
            *map(str, args),
        ]

    def __call__(self, *args: object, env: Optional[Dict[str, str]] = None) -> Result:
        done = subprocess.run(
            self.command(*args),
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def within(self, *args: object, env: Optional[Dict[str, str]] = None) -> Result:
        """Run it in this very process, as what calls it often does: a start takes its time."""
        import refresherr

        out, err = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                mock.patch.dict(os.environ, {**self.env, **(env or {})}, clear=True)
            )
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            code = refresherr.main(self.command(*args)[2:])
        return Result(code, out.getvalue(), err.getvalue())

    def start(self, *args: object) -> subprocess.Popen[str]:
        """Start it in the background."""
        return subprocess.Popen(
            self.command(*args),
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            # Under nohup, or behind a shell's &, it would inherit that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def make_database(self) -> None:
        """Make an empty database, as only a scan does else."""
        import refresherr

        refresherr.open_database(str(self.db_path)).close()

    def scan(self, *args: object) -> Dict[str, Any]:
        """Scan with --json and return the object."""
        result = self("scan", "--json", *args)
        assert result.out, result.err
        return result.json

    def query(self, sql: str, *values: object) -> List[Any]:
        """Ask the database, past the program."""
        conn = sqlite3.connect(str(self.db_path))
        try:
            return conn.execute(sql, values).fetchall()
        finally:
            conn.close()

    def statuses(self) -> Dict[str, str]:
        """Return {path: status}; names that are not UTF-8 as Python shows them."""
        rows = self.query("SELECT path, status, last_status FROM symlinks")
        assert all(status == last for _, status, last in rows)
        return {os.fsdecode(path): status for path, status, _ in rows}


class Library:
    """A directory of links and a directory of what they point to."""

    def __init__(self, folder: Path, mount: Optional[Path] = None) -> None:
        self.root = folder / "media"
        self.mount = mount or folder / "mount"
        self.root.mkdir(parents=True, exist_ok=True)
        self.mount.mkdir(parents=True, exist_ok=True)

    def link(self, name: str, target: Optional[str] = None, exists: bool = True) -> Path:
        """Make media/NAME -> mount/TARGET, and the target unless it is to be missing."""
        goal = self.mount / (target or name)
        goal.parent.mkdir(parents=True, exist_ok=True)
        if exists:
            goal.write_bytes(b"video")
        link = self.root / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(goal)
        return link

    def season(self, show: str, count: int, season: int = 1) -> List[Path]:
        """Make a season of `count` healthy episodes in a torrent folder of its own."""
        release = f"{show.replace(' ', '.')}.S{season:02d}.1080p"
        return [
            self.link(
                f"{show}/Season {season:02d}/{show} - S{season:02d}E{number:02d}.mkv",
                f"{release}/{show.replace(' ', '.')}.S{season:02d}E{number:02d}.mkv",
            )
            for number in range(1, count + 1)
        ]


def target_of(link: Path) -> Path:
    """Return what a link's text says."""
    return Path(os.readlink(link))


@pytest.fixture
def refresherr(tmp_path: Path) -> Refresherr:
    return Refresherr(tmp_path)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path)


@pytest.fixture
def write_config(refresherr: Refresherr) -> Callable[[str], Path]:
    """Return a function that writes a config file and has the program use it."""

    def write(text: str) -> Path:
        file = Path(refresherr.env["HOME"]) / "refresherr.ini"
        file.write_text(text, encoding="utf-8")
        file.chmod(0o600)
        refresherr.env["REFRESHERR_CONFIG"] = str(file)
        return file

    return write


@pytest.fixture
def tmpfs_mount(tmp_path: Path) -> Iterator[Any]:
    """A real tmpfs at tmp_path/mount; skips where root does not allow it."""
    from fuse_fs import tmpfs, tmpfs_available

    reason = tmpfs_available()
    if reason:
        pytest.skip(f"no tmpfs here: {reason}")
    point = tmp_path / "mount"
    point.mkdir()
    with tmpfs(str(point)) as mount:
        yield mount
