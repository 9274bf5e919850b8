"""refresherr.pyz: reproducible, answers an unfit Python with one line, does the real work."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

import pytest
from conftest import PROGRAM, PROJECT, Library, Refresherr

BUILDER = PROJECT / "build_zipapp.py"
PYENV = Path.home() / ".pyenv" / "versions"


class Bundled(Refresherr):
    """The program as refresherr.pyz."""

    def __init__(self, folder: Path, pyz: Path) -> None:
        super().__init__(folder)
        self.pyz = pyz

    def command(self, *args: object) -> List[str]:
        return [sys.executable, str(self.pyz), "--data-dir", str(self.data_dir), *map(str, args)]


def run(*command: object, cwd: Optional[Path] = None, **env: str) -> subprocess.CompletedProcess:
    """Run a command in a bare environment and return what it left behind."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=str(cwd) if cwd else None,
        env={"PATH": os.environ["PATH"], **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def build(file: Path, builder: Path = BUILDER, python: str = sys.executable) -> str:
    """Build the .pyz and return its hash."""
    done = run(python, builder, "-o", file)
    assert done.returncode == 0, done.stderr
    return hashlib.sha256(file.read_bytes()).hexdigest()


def pyenv_pythons() -> Dict[str, Path]:
    """Return the interpreters of pyenv by version: {"3.8.18": .../bin/python}."""
    return {file.parent.parent.name: file for file in sorted(PYENV.glob("*/bin/python"))}


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("build") / "refresherr.pyz"
    build(file)
    return file


@pytest.fixture
def bundled(tmp_path: Path, pyz: Path) -> Bundled:
    return Bundled(tmp_path, pyz)


# ---------------------------------------------------------------------------------------------
# The build
# ---------------------------------------------------------------------------------------------


def test_the_same_sources_give_the_same_bytes_elsewhere(tmp_path: Path, pyz: Path) -> None:
    elsewhere = tmp_path / "another folder"
    elsewhere.mkdir()
    for file in (BUILDER, PROGRAM):
        copy = elsewhere / file.name
        shutil.copyfile(str(file), str(copy))
        copy.chmod(0o600)
        os.utime(str(copy), (0, 1_000_000_000))
    previous = os.umask(0o077)
    try:
        # Without -o it is written beside the builder.
        done = run(sys.executable, elsewhere / BUILDER.name, cwd=tmp_path)
    finally:
        os.umask(previous)
    assert done.returncode == 0, done.stderr
    built = elsewhere / "refresherr.pyz"
    assert built.read_bytes() == pyz.read_bytes()
    assert stat.S_IMODE(built.stat().st_mode) == 0o755
    names = {file.name for file in elsewhere.iterdir() if file.name != "__pycache__"}
    assert names == {"build_zipapp.py", "refresherr.py", "refresherr.pyz"}


def test_every_python_builds_the_same_bytes(tmp_path: Path, pyz: Path) -> None:
    others = [
        python
        for version, python in pyenv_pythons().items()
        if re.match(r"3\.([89]|1\d)\.", version) and python.resolve() != Path(sys.executable)
    ]
    if not others:
        pytest.skip(f"no other Python in {PYENV}")
    expected = hashlib.sha256(pyz.read_bytes()).hexdigest()
    hashes = {str(python): build(tmp_path / "x.pyz", python=str(python)) for python in others}
    assert hashes == dict.fromkeys(hashes, expected)


def test_a_failed_build_leaves_the_old_file_alone(tmp_path: Path) -> None:
    shutil.copy(str(BUILDER), str(tmp_path))
    (tmp_path / "refresherr.py").write_text("# no version here\n")
    (tmp_path / "refresherr.pyz").write_text("the old one")
    done = run(sys.executable, tmp_path / BUILDER.name)
    assert done.returncode == 1
    assert done.stderr == "refresherr.py has no __version__\n"
    assert (tmp_path / "refresherr.pyz").read_text() == "the old one"


# ---------------------------------------------------------------------------------------------
# A Python that is not fit for it
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7"])
@pytest.mark.parametrize("arguments", [["scan"], ["--version"]], ids=["scan", "version"])
def test_an_old_python_is_answered_with_one_line(
    pyz: Path, version: str, arguments: List[str]
) -> None:
    found = [python for name, python in pyenv_pythons().items() if name.startswith(f"{version}.")]
    if not found:
        pytest.skip(f"no Python {version} in {PYENV}")
    done = run(found[0], pyz, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    for words in (str(found[0]), f"(Python {version}.", "3.8 or newer", "apt install python3"):
        assert words in done.stderr


@pytest.mark.parametrize("module", ["sqlite3", "logging", "urllib"])
def test_an_incomplete_python_is_answered_with_one_line(
    pyz: Path, tmp_path: Path, module: str
) -> None:
    # What `import sqlite3` does on a FreeBSD jail or an Entware without the package.
    (tmp_path / f"{module}.py").write_text(f"raise ImportError(\"No module named '_{module}'\")")
    done = run(sys.executable, pyz, "scan", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    for words in (
        sys.executable,
        "Python {}.{}.{}".format(*sys.version_info[:3]),
        f"No module named '_{module}'",
        "opkg install python3 python3-sqlite3",
        "pkg install py{}{}-sqlite3".format(*sys.version_info[:2]),
    ):
        assert words in done.stderr


# ---------------------------------------------------------------------------------------------
# The work
# ---------------------------------------------------------------------------------------------


def test_version_is_that_of_the_program(pyz: Path, tmp_path: Path) -> None:
    expected = run(sys.executable, PROGRAM, "--version")
    done = run(sys.executable, pyz, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.stdout, "")
    # Answered before the program is compiled, whatever its imports cost.
    quick = run(sys.executable, "-v", pyz, "--version")
    assert "import 'sqlite3'" not in quick.stderr
    # Behind a command it is the program that answers.
    assert run(sys.executable, pyz, "-v", "--version").stdout == expected.stdout


def test_scan_and_broken_do_real_work(bundled: Bundled, library: Library) -> None:
    library.season("Some Show", 3)
    library.link("Some Show/Season 01/gone.mkv", "Some.Show.S01.1080p/gone.mkv", exists=False)
    scan = bundled.scan(library.root)
    assert scan["totals"]["ok"] == 3
    assert scan["totals"]["broken"] == 1
    links = bundled("broken", "--json").json["links"]
    assert [Path(link["path"]).name for link in links] == ["gone.mkv"]


def test_exit_status_passes_through(bundled: Bundled, library: Library) -> None:
    library.season("Some Show", 3)
    library.link("gone.mkv", "Some.Show.S01.1080p/gone.mkv", exists=False)
    assert bundled("scan", "-q", library.root).code == 0
    assert bundled("scan", "-q", "--exit-code", library.root).code == 10
    assert bundled("no-such-command").code == 2


def test_runs_by_itself_from_anywhere(pyz: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a folder, with spaces"
    folder.mkdir()
    copy = folder / "my refresherr.pyz"
    shutil.copy2(str(pyz), str(copy))
    media = tmp_path / "media"
    media.mkdir()
    direct = run(copy, "--data-dir", tmp_path / "data", "scan", media, "--json", cwd=Path("/"))
    relative = run(f"./{copy.name}", "--data-dir", "data 2", "scan", media, "--json", cwd=folder)
    for done in (direct, relative):
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "data" / "symlinks.db").exists()
    assert (folder / "data 2" / "symlinks.db").exists()


def test_a_traceback_names_file_line_and_source(bundled: Bundled) -> None:
    bundled.data_dir.mkdir()
    bundled.db_path.write_bytes(b"this is no database at all" * 100)
    result = bundled("-vv", "stats")
    assert result.code == 1
    place = re.escape(f'File "{bundled.pyz}/refresherr.py"')
    frames = re.findall(rf"{place}, line (\d+), in \w+\n +(.+)", result.err)
    assert frames, result.err
    source = PROGRAM.read_text(encoding="utf-8").splitlines()
    for line, text in frames:
        assert source[int(line) - 1].strip() == text
