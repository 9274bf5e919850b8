#!/usr/bin/env python3
"""Build refresherr.pyz: the program in one executable file, the same bytes wherever it is built.

python3 build_zipapp.py [-o FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHEBANG = b"#!/usr/bin/env python3\n"

# The first thing that runs, so that Python 2.7 must be able to read it.
MAIN = '''\
"""Start Refresherr, or say in one line why this Python cannot."""
import os
import sys


def refuse(problem, cure):
    python = "%s (Python %d.%d.%d)" % ((sys.executable or "this Python",) + sys.version_info[:3])
    sys.exit("refresherr: %s %s; %s" % (python, problem, cure))


if sys.version_info < (3, 8):
    refuse(
        "is too old, 3.8 or newer is needed",
        "Synology and QNAP: install a newer Python package; Debian and Ubuntu: apt install python3;"
        " Entware: opkg install python3; FreeBSD: pkg install python3",
    )

if sys.argv[1:] == ["--version"]:
    sys.stdout.write("refresherr @VERSION@\\n")
    sys.stdout.flush()
    os._exit(0)  # tidying up would take as long as all of the above

try:
    import email, http, logging, sqlite3, urllib  # what NAS systems pack separately
except ImportError as error:
    refuse(
        "is incomplete: %s" % error,
        "Synology and QNAP: install the full Python 3 package; Debian and Ubuntu: apt install"
        " python3; Entware: opkg install python3 python3-sqlite3; FreeBSD: pkg install"
        " py%d%d-sqlite3" % sys.version_info[:2],
    )

# `import refresherr` would do, but zipimport compiles a module twice at every start.
file = os.path.join(__loader__.archive, "refresherr.py")
module = sys.modules["refresherr"] = type(sys)("refresherr")
module.__file__, module.__loader__ = file, __loader__  # tracebacks ask the loader for lines
exec(compile(__loader__.get_data(file), file, "exec", dont_inherit=True), module.__dict__)
try:
    sys.exit(module.main())
except KeyboardInterrupt:  # before or behind what main() itself answers
    sys.exit(130)
'''


def make_archive(source: bytes) -> bytes:
    """Return the .pyz with this program in it; nothing but `source` decides about its bytes."""
    version = re.search(rb'^__version__ = "([\w.+-]+)"$', source, re.MULTILINE)
    if not version:
        raise SystemExit("refresherr.py has no __version__")
    main = MAIN.replace("@VERSION@", version.group(1).decode("ascii")).encode("ascii")
    archive = io.BytesIO()
    archive.write(SHEBANG)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as bundle:
        for name, content in sorted({"__main__.py": main, "refresherr.py": source}.items()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, on every system
            entry.external_attr = 0o100644 << 16
            bundle.writestr(entry, content)
    return archive.getvalue()


def write_program(file: Path, content: bytes) -> None:
    """Write an executable file whole or not at all: a NAS may be about to run the old one."""
    if os.path.islink(file) or (file.exists() and not file.is_file()):
        raise SystemExit(f"{file} is no regular file, and stays as it is; name another one")
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with open(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o755)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description="Build refresherr.pyz.")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "refresherr.pyz")
    file: Path = parser.parse_args().output
    write_program(file, make_archive((HERE / "refresherr.py").read_bytes()))
    print(file)


if __name__ == "__main__":
    main()
