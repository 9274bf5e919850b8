"""A small real FUSE file system for the tests: a cloud mount whose outages can be staged.

It mirrors a local directory read-only and speaks the kernel's protocol on /dev/fuse itself,
without libfuse. The daemon is a process of its own (this very file, run as a script), so that
it can be killed or frozen like rclone, and nothing of it leaks into the process of the tests.

    with FuseMount("/mnt/zurg", "/tmp/library", latency=0.005) as fs:
        fs.fail(errno.EIO)  # every path below the root now answers "Input/output error"
        fs.heal()
        fs.kill()  # stat now gives ENOTCONN, as after a crash of rclone

Needs root and Linux 4.20 or newer: ask fuse_available() and tmpfs_available() first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import mmap
import os
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Union

AnyPath = Union[str, bytes, "os.PathLike[str]"]

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


def _mount(device: str, target: str, fs_type: str, flags: int, options: str) -> None:
    texts = device.encode(), os.fsencode(target), fs_type.encode()
    if _libc.mount(*texts, flags, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def _unmount(target: str) -> None:
    """Detach what is mounted there, if anything, without ever blocking.

    MNT_FORCE makes FUSE abort the connection, as /sys/fs/fuse/connections/N/abort would (which
    needs fusectl mounted): whoever waits for an answer, even in D state, gets ECONNABORTED.
    """
    _libc.umount2(os.fsencode(target), MNT_FORCE | MNT_DETACH | UMOUNT_NOFOLLOW)


def _mount_fuse(target: str, subtype: str, device: str) -> int:
    """Mount a FUSE file system that nobody serves yet; returns the descriptor to serve."""
    fd = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
        _mount(device, target, f"fuse.{subtype}", MS_RDONLY | MS_NOSUID | MS_NODEV, options)
    except OSError:
        os.close(fd)
        raise
    return fd


def fuse_available() -> str:
    """Why FUSE mounts cannot be made here, in one line; empty when they can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.close(_mount_fuse(folder, "probe", "probe"))
        except OSError as error:
            return f"no FUSE mounts here (uid {os.geteuid()}): {error}"
        _unmount(folder)
    return ""


def tmpfs_available() -> str:
    """Why a tmpfs cannot be mounted here, in one line; empty when it can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tmpfs(folder, size="64k"):
                return ""
        except OSError as error:
            return f"no tmpfs mounts here (uid {os.geteuid()}): {error}"


class tmpfs:
    """A real tmpfs (or ramfs), mounted inside the with block. Unmounting loses its content."""

    def __init__(self, mount_point: AnyPath, size: str = "16m", fs_type: str = "tmpfs") -> None:
        self.mount_point = os.path.realpath(os.fsdecode(mount_point))
        self.fs_type = fs_type
        self.options = f"size={size}" if fs_type == "tmpfs" else ""  # a ramfs has no limit
        self.mounted = False

    def mount(self) -> None:
        if not self.mounted:
            _mount(self.fs_type, self.mount_point, self.fs_type, 0, self.options)
            self.mounted = True

    def unmount(self) -> None:
        if self.mounted:
            self.mounted = False
            _unmount(self.mount_point)

    def __enter__(self) -> tmpfs:
        self.mount()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.unmount()


# The test and the daemon share a directory. It holds the switches as JSON, and some numbers in
# shared memory, which can be read even while the daemon is frozen and after it was killed.
# The test counts its changes of the switches; the daemon, its work, and the bytes of files.
GENERATION, REQUESTS, BYTES = 0, 1, 2
HEALTHY: dict[str, Any] = {"fail": 0, "fail_root": False, "hang": False, "empty": False}
HEALTHY.update(fail_paths={}, hang_paths=[], hidden=[], fail_beneath={}, fail_listings={}, delay=0)
HEALTHY.update(fail_reads={}, hang_reads=[])


def _map_counters(state_dir: str) -> memoryview:
    with open(os.path.join(state_dir, "counters"), "r+b") as file:
        # As native 64-bit words, each of which is read and written in one go.
        return memoryview(mmap.mmap(file.fileno(), 24)).cast("Q")


def _relative(path: AnyPath) -> str:
    """The daemon's spelling of a path below the root: "a/b", or "" for the root itself."""
    text = os.fsdecode(path).strip("/")
    return "" if text == "." else text


class FuseMount:
    """The directory `source`, mirrored read-only on `mount_point` by a daemon of its own.

    A switch (fail, hang, empty, ...) holds for every request that arrives after the call; a
    hang outranks a failure, which outranks the emptiness. As on any FUSE mount, the kernel
    answers from its cache for `timeout` seconds: timeout=0 lets the daemon see every lookup.
    mount() may be called again after close(), as when a service restarts rclone.
    """

    def __init__(
        self,
        mount_point: AnyPath,
        source: AnyPath,
        latency: float = 0.0,
        fs_subtype: str = "rclone",
        *,
        threads: int = 16,
        timeout: float = 1.0,
        device: str = "zurg:",
    ) -> None:
        # Resolved now, once: later on, looking at the mount point may block.
        self.mount_point = os.path.realpath(os.fsdecode(mount_point))
        self._config = {"mount_point": self.mount_point, "subtype": fs_subtype, "device": device}
        self._config["source"] = os.path.realpath(os.fsdecode(source))
        self._numbers = {"latency": latency, "threads": threads, "timeout": timeout}
        self._lock = threading.Lock()
        self._counters = memoryview(bytes(24)).cast("Q")
        self._daemon: subprocess.Popen[bytes] | None = None

    def mount(self) -> None:
        """Start the daemon and wait until it serves the mount."""
        if self._daemon:
            raise RuntimeError("already mounted")
        self._state = tempfile.TemporaryDirectory(prefix="fuse_fs-")
        with open(os.path.join(self._state.name, "counters"), "wb") as file:
            file.write(bytes(24))
        self._counters = _map_counters(self._state.name)
        self._switches = dict(HEALTHY)
        config = json.dumps({**self._config, **self._numbers, "state_dir": self._state.name})
        self._daemon = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), config],
            stdin=subprocess.PIPE,  # never written to: its end tells that the test is gone
            stdout=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the test, which then cleans up
        )
        assert self._daemon.stdout
        with self._daemon.stdout as out:
            answer = out.readline() if select.select([out], [], [], 20)[0] else b"no answer"
        if answer != b"mounted\n":
            self.close()
            raise RuntimeError(f"FUSE daemon: {answer.decode(errors='replace').strip()}")

    def close(self) -> None:
        """Unmount and end the daemon, whatever state both are in; release whoever waits."""
        daemon, self._daemon = self._daemon, None
        if daemon:
            _unmount(self.mount_point)
            daemon.kill()  # ends a frozen process too
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
            with contextlib.suppress(OSError):
                assert daemon.stdin
                daemon.stdin.close()
                self._state.cleanup()

    def __enter__(self) -> FuseMount:
        self.mount()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def fail(self, code: int, include_root: bool = False, delay: float = 0.0) -> None:
        """Answer this errno for every path below the root (0: no longer), each after a delay."""
        self._switch(fail=code, fail_root=include_root, delay=delay)

    def fail_paths(self, codes: Mapping[Any, int]) -> None:
        """Answer these errnos for exactly these relative paths ({}: no longer)."""
        self._switch(fail_paths={_relative(path): code for path, code in codes.items()})

    def fail_beneath(self, codes: Mapping[Any, int], delay: float = 0.0) -> None:
        """Let these directories be there, but answer these errnos for their listing and content."""
        found = {_relative(path): code for path, code in codes.items()}
        self._switch(fail_beneath=found, delay=delay)

    def fail_listings(self, codes: Mapping[Any, int]) -> None:
        """Answer these errnos where exactly these directories are listed; names are found."""
        self._switch(fail_listings={_relative(path): code for path, code in codes.items()})

    def fail_reads(self, codes: Mapping[Any, int]) -> None:
        """Answer these errnos where exactly these files are read; they are found and opened."""
        self._switch(fail_reads={_relative(path): code for path, code in codes.items()})

    def hang_reads(self, paths: Iterable[AnyPath]) -> None:
        """Do not answer where exactly these files are read ([]: answer again)."""
        self._switch(hang_reads=[_relative(path) for path in paths])

    def hide(self, paths: Iterable[AnyPath]) -> None:
        """Neither list these relative paths nor know them and what lies beneath ([]: show all)."""
        self._switch(hidden=[_relative(path) for path in paths])

    def hang(self, on: bool = True) -> None:
        """Read every request and do not answer it until hang(False) or heal()."""
        self._switch(hang=on)

    def hang_paths(self, paths: Iterable[AnyPath]) -> None:
        """Do not answer requests for exactly these relative paths ([]: answer them again)."""
        self._switch(hang_paths=[_relative(path) for path in paths])

    def empty(self, on: bool = True) -> None:
        """Show an empty root and know no name, like a backend that answers 404."""
        self._switch(empty=on)

    def heal(self) -> None:
        """Turn all switches off. Requests that hang are answered now."""
        self._switch(**HEALTHY)

    def kill(self) -> None:
        """SIGKILL the daemon but leave the mount, which then answers ENOTCONN."""
        if self._daemon:
            self._daemon.kill()
            self._daemon.wait(10)

    def freeze(self) -> None:
        """SIGSTOP the daemon, and wait until it has stopped."""
        if self._daemon and self._daemon.poll() is None:
            self._daemon.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._daemon.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        """SIGCONT the daemon."""
        if self._daemon:
            self._daemon.send_signal(signal.SIGCONT)

    def requests(self) -> int:
        """How many requests have arrived since mount(), hanging ones included.

        Not counted is the kernel's own housekeeping, which comes at any time (BACKSTAGE).
        """
        return self._counters[REQUESTS]

    def bytes_read(self) -> int:
        """How many bytes of files the kernel has been given since mount()."""
        return self._counters[BYTES]

    def _switch(self, **changes: Any) -> None:
        if not self._daemon:
            raise RuntimeError("not mounted")
        with self._lock:
            self._switches.update(changes)
            path = os.path.join(self._state.name, "switches")
            with open(path + ".new", "w", encoding="ascii") as file:
                json.dump(self._switches, file)
            os.replace(path + ".new", path)
            self._counters[GENERATION] += 1


# What follows is the daemon. For the structures see linux/fuse.h, which pads explicitly.
IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid extlen padding
OUT_HEADER = struct.Struct("=IiQ")  # len error unique
INIT_IN = struct.Struct("=4I")  # major minor max_readahead flags
INIT_OUT = struct.Struct("=4I2H2I36x")  # ... max_background congestion max_write time_gran
ENTRY_OUT = struct.Struct("=4Q2I")  # nodeid generation, timeouts of entry and attr; then attr
ATTR_OUT = struct.Struct("=QII")  # timeout padding; then attr
ATTR = struct.Struct("=3Q3q10I")  # ino size blocks, times, their nanoseconds, mode and so on
OPEN_OUT = struct.Struct("=QII")  # fh open_flags padding
READ_IN = struct.Struct("=QQI")  # fh offset size, in READ and READDIR alike
RELEASE_IN = struct.Struct("=Q")  # fh
DIRENT = struct.Struct("=QQII")  # ino offset namelen type; then the name, padded to 8 bytes
STATFS_OUT = struct.Struct("=5Q3I28x")  # blocks bfree bavail files ffree bsize namelen frsize

LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 5, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS = 25, 26, 27, 28, 29, 34
INTERRUPT, DESTROY, BATCH_FORGET = 36, 38, 42
UNANSWERED = {FORGET, BATCH_FORGET, INTERRUPT}
BACKSTAGE = UNANSWERED | {INIT, RELEASE, RELEASEDIR, DESTROY}  # never fail, hang or wait
SLOW = {LOOKUP, GETATTR, OPENDIR, READDIR, READLINK, OPEN}

MAJOR, MINOR, ROOT = 7, 31, 1
ASYNC_READ, PARALLEL_DIROPS = 1 << 0, 1 << 18  # without the latter, one lookup per folder
MAX_WRITE, BUFFER_SIZE = 4096, 1 << 16  # nothing is ever written: the least there is
POLL_SECONDS = 0.01


class Request(NamedTuple):
    opcode: int
    unique: int
    node: int
    body: bytes


class Server:
    """Answers the kernel's requests from the source directory, as the switches allow."""

    def __init__(self, fd: int, config: dict[str, Any]) -> None:
        self.fd = fd
        self.source = os.fsencode(config["source"])
        self.latency: float = config["latency"]
        self.timeout = divmod(int(config["timeout"] * 1e9), 10**9)
        self.switches_path = os.path.join(config["state_dir"], "switches")
        self.counters = _map_counters(config["state_dir"])
        self.switches, self.generation = HEALTHY, 0
        self.lock = threading.Lock()
        self.parked: list[Request] = []  # read but not answered: they hang
        # A path keeps its number while the mount lives, so that no two paths ever share one.
        self.paths = {0: b"", ROOT: b""}  # INIT and DESTROY come for node 0
        self.numbers = {b"": ROOT}
        self.handles: dict[int, Any] = {}  # the descriptor of a file, the listing of a folder
        self.new_handle = itertools.count(1)
        self.gone = threading.Event()

    def run(self) -> None:
        """Serve requests until the mount is gone; one thread of several."""
        while True:
            try:
                data = os.read(self.fd, BUFFER_SIZE)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EAGAIN):
                    continue  # the caller has given up meanwhile
                self.gone.set()  # ENODEV or ECONNABORTED: unmounted
                return
            _, opcode, unique, node, *_ = IN_HEADER.unpack_from(data)
            if opcode not in UNANSWERED:  # a backend that hangs does not hear INTERRUPT either
                self.receive(Request(opcode, unique, node, data[IN_HEADER.size :]))

    def receive(self, request: Request) -> None:
        if request.opcode not in BACKSTAGE:
            with self.lock:
                self.counters[REQUESTS] += 1
            if request.opcode in SLOW and self.latency:
                time.sleep(self.latency)
            with self.lock:
                self.read_switches()
                if self.hangs(request):
                    self.parked.append(request)  # and not the thread, lest others hang too
                    return
        self.reply(request)

    def answer_parked(self) -> None:
        """Answer the requests that need not hang any longer."""
        due: list[Request] = []
        with self.lock:
            self.read_switches()
            waiting, self.parked = self.parked, []
            for request in waiting:
                (self.parked if self.hangs(request) else due).append(request)
        for request in due:
            self.reply(request)

    def read_switches(self) -> None:
        generation = self.counters[GENERATION]  # first, so that the file is no older than it
        if generation != self.generation:
            with open(self.switches_path, encoding="ascii") as file:
                self.switches = json.load(file)
            self.generation = generation

    def path_of(self, request: Request) -> bytes:
        """The path that a request is about, relative to the root."""
        path = self.paths[request.node]
        return _join(path, request.body[:-1]) if request.opcode == LOOKUP else path

    def hangs(self, request: Request) -> bool:
        paths = self.switches["hang_paths"]
        if request.opcode == READ:
            paths = [*paths, *self.switches["hang_reads"]]
        return self.switches["hang"] or os.fsdecode(self.path_of(request)) in paths

    def failure(self, opcode: int, path: bytes) -> int:
        switches, name = self.switches, os.fsdecode(path)
        code: int = switches["fail_paths"].get(name, 0)
        if path or switches["fail_root"]:
            code = code or switches["fail"]
        if opcode == READ:
            code = code or switches["fail_reads"].get(name, 0)
        above = _parents(name)
        if opcode in (OPENDIR, READDIR):
            code = code or switches["fail_listings"].get(name, 0)
            above = [name, *above]
        codes = (switches["fail_beneath"].get(folder, 0) for folder in above)
        code = code or next(filter(None, codes), 0)
        gone = (path and switches["empty"]) or any(
            folder in switches["hidden"] for folder in [name, *_parents(name)]
        )
        return code or (errno.ENOENT if gone else 0)

    def reply(self, request: Request) -> None:
        path, code, payload = self.path_of(request), 0, b""
        try:
            if request.opcode not in BACKSTAGE:
                code = self.failure(request.opcode, path)
                time.sleep(self.switches["delay"] if code else 0)
            if not code:
                payload = self.perform(request.opcode, request.body, path)
        except OSError as error:
            code = error.errno or errno.EIO
        except Exception:
            traceback.print_exc()
            code = errno.EIO
        header = OUT_HEADER.pack(OUT_HEADER.size + len(payload), -code, request.unique)
        with contextlib.suppress(OSError):  # unmounted or aborted meanwhile
            os.write(self.fd, header + payload)

    def perform(self, op: int, body: bytes, path: bytes) -> bytes:
        """The answer to a request; raises OSError where the answer is an error."""
        full = _join(self.source, path)
        if op == LOOKUP:
            attr = self.attr(path, full)  # first, for a missing file gets no number
            seconds, nanos = self.timeout
            return ENTRY_OUT.pack(self.number(path), 0, seconds, seconds, nanos, nanos) + attr
        if op == GETATTR:
            return ATTR_OUT.pack(*self.timeout, 0) + self.attr(path, full)
        if op == READLINK:
            return os.readlink(full)
        if op == OPEN:
            return self.opened(os.open(full, os.O_RDONLY | os.O_NOFOLLOW))
        if op == OPENDIR:
            os.lstat(full)
            return self.opened([])
        if op == READ:
            handle, offset, size = READ_IN.unpack_from(body)
            data = os.pread(self.handles[handle], size, offset)
            with self.lock:
                self.counters[BYTES] += len(data)
            return data
        if op == READDIR:
            return self.readdir(path, *READ_IN.unpack_from(body))
        if op == RELEASE:
            os.close(self.handles.pop(*RELEASE_IN.unpack_from(body)))
        elif op == RELEASEDIR:
            self.handles.pop(*RELEASE_IN.unpack_from(body))
        elif op == STATFS:
            fs = os.statvfs(full)
            room = fs.f_blocks, fs.f_bfree, fs.f_bavail, fs.f_files, fs.f_ffree
            return STATFS_OUT.pack(*room, fs.f_bsize, fs.f_namemax, fs.f_frsize)
        elif op == INIT:
            _, minor, readahead, flags = INIT_IN.unpack_from(body)
            flags &= ASYNC_READ | PARALLEL_DIROPS
            limits = 64, 48, MAX_WRITE, 1
            return INIT_OUT.pack(MAJOR, min(minor, MINOR), readahead, flags, *limits)
        elif op not in (ACCESS, FLUSH, DESTROY):
            raise OSError(errno.ENOSYS, "not implemented")
        return b""

    def readdir(self, path: bytes, handle: int, offset: int, size: int) -> bytes:
        """As many directory entries as fit; `offset` is how many the kernel has already."""
        if offset == 0 or self.switches["empty"]:  # opened or rewound; or cut off in between
            self.handles[handle] = self.listing(path)
        chunk = b""
        for number, name, mode in self.handles[handle][offset:]:
            offset += 1
            entry = DIRENT.pack(number, offset, len(name), stat.S_IFMT(mode) >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(chunk) + len(entry) > size:
                break
            chunk += entry
        return chunk

    def listing(self, path: bytes) -> list[tuple[int, bytes, int]]:
        above = path.rpartition(b"/")[0]
        found = [(self.number(path), b".", stat.S_IFDIR), (self.number(above), b"..", stat.S_IFDIR)]
        if not self.switches["empty"]:
            with os.scandir(_join(self.source, path)) as entries:
                for entry in entries:
                    inner = _join(path, entry.name)
                    if os.fsdecode(inner) in self.switches["hidden"]:
                        continue
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        mode = entry.stat(follow_symlinks=False).st_mode
                        found.append((self.number(inner), entry.name, mode))
        return found

    def number(self, path: bytes) -> int:
        with self.lock:
            number = self.numbers.setdefault(path, len(self.paths))
            self.paths[number] = path
            return number

    def opened(self, what: Any) -> bytes:
        handle = next(self.new_handle)
        self.handles[handle] = what
        return OPEN_OUT.pack(handle, 0, 0)

    def attr(self, path: bytes, full: bytes) -> bytes:
        st = os.lstat(full)
        stamps = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
        (atime, a_nanos), (mtime, m_nanos), (ctime, c_nanos) = (divmod(ns, 10**9) for ns in stamps)
        times = atime, mtime, ctime, a_nanos, m_nanos, c_nanos
        owner = st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev & 0xFFFFFFFF
        size = st.st_size, st.st_blocks
        return ATTR.pack(self.number(path), *size, *times, *owner, st.st_blksize, 0)


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder and name else folder or name


def _parents(name: str) -> list[str]:
    """The directories above a relative path, the root "" being the last one."""
    parts = name.split("/") if name else []
    return ["/".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)]


def _serve(config: dict[str, Any]) -> None:
    """Mount, say so on stdout, and serve until the mount or the test is gone."""
    try:
        fd = _mount_fuse(config["mount_point"], config["subtype"], config["device"])
    except OSError as error:
        print(error)
        return
    server = Server(fd, config)
    for _ in range(config["threads"]):
        threading.Thread(target=server.run, daemon=True).start()
    print("mounted", flush=True)
    while not server.gone.is_set():
        if select.select([0], [], [], POLL_SECONDS)[0]:
            _unmount(config["mount_point"])  # the test has ended without close()
            shutil.rmtree(config["state_dir"], ignore_errors=True)
            break
        server.answer_parked()
    os._exit(0)  # the threads may be asleep


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
