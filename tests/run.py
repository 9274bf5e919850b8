"""Run the tests: python3 tests/run.py [pytest arguments]

pytest goes into a virtual environment of its own, one for each Python version, below .venv;
the first run needs the network for that, later ones do not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List

TESTS = Path(__file__).resolve().parent
PROJECT = TESTS.parent


def has_pytest(python: Path) -> bool:
    """Tell whether this interpreter runs at all and finds pytest."""
    try:
        return not subprocess.call([str(python), "-c", "import pytest"], stderr=subprocess.DEVNULL)
    except OSError:
        return False


def prepare(folder: Path) -> Path:
    """Return the interpreter of the virtual environment `folder`, with pytest in it."""
    python = folder / "bin" / "python"
    if not has_pytest(python):
        if not importlib.util.find_spec("ensurepip"):
            # Debian packs it separately; its own words are twelve lines.
            version = "{}.{}".format(*sys.version_info[:2])
            sys.exit(
                f"{sys.executable} has no pip and no ensurepip to install pytest with: "
                f"apt install python{version}-venv (or python3-pytest), then run this again"
            )
        print(f"Installing pytest into {folder}", file=sys.stderr)
        # Cleared, since the interpreter behind an older one may be gone.
        if subprocess.call([sys.executable, "-m", "venv", "--clear", str(folder)]):
            sys.exit(f"{sys.executable} cannot make a virtual environment at {folder}; see above")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.call([*pip, "pytest"]):
            sys.exit("cannot install pytest; see above. Is the network down, PyPI out of reach?")
    return python


def names_tests(arguments: List[str]) -> bool:
    """Tell whether the arguments say which tests to run: tests/test_x.py or ...::test_y."""
    return any(Path(word.split("::")[0]).exists() for word in arguments if word[:1] != "-")


def main(arguments: List[str]) -> int:
    """Run pytest with these arguments and return its exit status."""
    command = ["-m", "pytest", "--rootdir", str(PROJECT), *arguments]
    if not names_tests(arguments):
        command.append(str(TESTS))
    with contextlib.ExitStack() as stack:
        is_own = sys.prefix != sys.base_prefix or not importlib.util.find_spec("ensurepip")
        if is_own and importlib.util.find_spec("pytest"):
            python = Path(sys.executable)  # in a virtual environment, or Debian's python3-pytest
        elif os.access(str(PROJECT), os.W_OK):
            python = prepare(PROJECT / ".venv" / "py{}.{}".format(*sys.version_info[:2]))
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="refresherr-tests-"))
            python = prepare(Path(folder))
        try:
            return subprocess.call([str(python), *command])
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
