"""Files of a run folder: written whole or not at all, and one training at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from kanseg.errors import UserError
from kanseg.progress import note

# Seconds after which a temporary file of a dead, or an unknown, writer is nobody's.
STALE, LONG_STALE = 60, 2 * 86400
PART = ".part"
# Seconds between two signs of life of a lock's owner, and after how many without one it counts as dead.
SIGN, SILENCE = 15, 120
TEMPORARY, HELD = "kanseg-", ".held"  # how temporary folders are called, and the file that is locked in them
MOST_OF_A_NAME = 100  # bytes, for a file system takes 255
SURROGATES = "surrogateescape"  # how Python keeps bytes of a name that are no UTF-8
T = TypeVar("T")
_swept: dict[Path, float] = {}  # when each folder was


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file atomically: whatever happens, `path` is the old file or the whole new one.

    Several processes may write it at once. What a SIGKILL leaves of a temporary file is removed by a later write.

    Raises:
        UserError: the disk is full or the folder cannot be written; the temporary file is removed.
    """
    part = part_of(path)
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        kept = " The last complete file there is unharmed." if path.exists() else ""
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}.{kept} Free space or choose another folder."
        ) from error
    finally:
        with suppress(OSError):  # after success it is gone already
            part.unlink()
    return path


def part_of(path: Path, suffix: str = "") -> Path:
    """A name beside `path` for its content while it is written; such files of dead writers are removed on the way.

    Args:
        suffix: that the name ends in, where it decides the format.
    """
    _sweep(path.parent)
    writer = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    start = os.fsencode(path.name)[:MOST_OF_A_NAME].decode("utf-8", "ignore")
    return path.with_name(f".{start}.{writer}{PART}{suffix}")


def _sweep(folder: Path) -> None:
    """Remove what dead writers of this machine left in a folder, and what others left days ago; not at every call."""
    now = time.monotonic()
    if now - _swept.get(folder, -math.inf) < STALE:
        return
    _swept[folder] = now
    for part in folder.glob(f".*{PART}*"):
        with suppress(OSError, ValueError):
            host, pid, _ = part.name.rpartition(PART)[0].rsplit("-", 2)
            own = host.endswith(f".{socket.gethostname()}")
            dead = own and not psutil.pid_exists(int(pid))
            if time.time() - part.stat().st_mtime > (STALE if dead else LONG_STALE):
                part.unlink()


def write_text(path: Path, text: str) -> Path:
    """Write text atomically, in UTF-8; what names of files have that is none stands as it is."""
    return write_bytes(path, text.encode("utf-8", SURROGATES))


def write_json(path: Path, values: Any) -> Path:
    """Write JSON atomically, one key a line."""
    return write_bytes(path, (json.dumps(values, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote, None where there is no such file or no JSON object in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def parse_json(
    path: Path | str, what: str, remedy: str, made: Callable[[Any], T] = lambda values: values
) -> T:
    """What `made` makes of the JSON, of any encoding that JSON may have, in a file that has to be there.

    Args:
        what: it is to be, and `remedy` what to do where it is none, for the error.

    Raises:
        UserError: no such file, no JSON, or values of another kind than `made` takes.
    """
    try:
        return made(json.loads(Path(path).read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as {what} ({error}). {remedy}") from error


def an_object(values: Any) -> dict[str, Any]:
    """The values of a JSON object; others raise `TypeError`, for `parse_json`."""
    if not isinstance(values, dict):
        raise TypeError(f"an object was expected, not {str(values)[:40]}")
    return values


def make_folder(path: Path) -> Path:
    """Make a folder and its parents where it is not there, or say why it cannot be made or written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Folder {path} cannot be made: {error.strerror or error}. Choose another folder."
        ) from error
    if not os.access(path, os.W_OK):
        raise UserError(f"Folder {path} cannot be written. Choose another folder.")
    return path


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other process is within such a body of the same folder; on Windows there is no waiting."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def temporary_folder(place: Path | str | None = None) -> tempfile.TemporaryDirectory[str]:
    """A new folder in `place` that is gone with this object, or where a kill is its end, when the next one is made.

    A living process is known by its lock on a file in its folder; on Windows, and where there are no locks, folders of
    killed ones stay.
    """
    place = place or tempfile.gettempdir()
    made = tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=place)
    if sys.platform == "win32":
        return made
    import fcntl

    for held in Path(place).glob(f"{TEMPORARY}*/{HELD}"):
        with suppress(OSError), held.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(held.parent, ignore_errors=True)
    unheld = Path(made.name) / f"{HELD}{PART}"
    handle = os.open(unheld, os.O_CREAT | os.O_WRONLY)
    weakref.finalize(made, os.close, handle)
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
        unheld.rename(Path(made.name) / HELD)
    return made


@contextmanager
def locked(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Hold `folder/.lock` while the body runs, if `wanted`; a lock whose process is dead is taken over.

    Of a process on another machine or in another container, as a batch system or Kubernetes starts a job again, it is
    waited for that it gives no sign of life any more.

    Raises:
        UserError: a living process holds the lock.
    """
    if not wanted:
        yield
        return
    lock, over = folder / ".lock", threading.Event()
    mine = _take(lock)
    threading.Thread(target=_live, args=(lock, mine, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _drop(lock, mine)


def _live(lock: Path, mine: str, over: threading.Event) -> None:
    """Give signs of life until it is over; end this process where another took it for dead, as a suspended one is."""
    while not over.wait(SIGN):
        with suppress(OSError):
            if lock.read_text() == mine:
                os.utime(lock)
            elif not over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _take(lock: Path) -> str:
    """Take the lock; returns what stands in it now."""
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
    content = json.dumps({**mine, "within": _namespace(), "token": uuid.uuid4().hex})
    for _ in range(3):
        try:
            with lock.open("x") as file:
                file.write(content)
            return content
        except FileExistsError:
            _drop(lock, _refuse_if_alive(lock))
        except OSError as error:
            raise UserError(
                f"{lock} cannot be written: {error.strerror or error}. Choose another folder."
            ) from error
    raise UserError(f"{lock} is being taken by another training at this moment. Choose another run folder.")


def _drop(lock: Path, content: str) -> None:
    """Remove the lock if it is the one with this content; another that was taken meanwhile is put back."""
    aside = lock.with_name(f".lock.{uuid.uuid4().hex[:8]}")
    with suppress(OSError):
        if lock.read_text() != content:
            return
        lock.rename(aside)
        if aside.read_text() != content:  # it was taken in between
            if not lock.exists():
                aside.rename(lock)
            return
    aside.unlink(missing_ok=True)


def _refuse_if_alive(lock: Path) -> str:
    """The content of a lock whose owner is dead."""
    content = ""
    try:
        time.sleep(0 if lock.stat().st_size else 0.5)  # its owner may be about to write it
        content = lock.read_text()
        owner = json.loads(content)
        pid, host, started = owner["pid"], owner["host"], owner["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return content  # cut short by a kill
    elsewhere = host != socket.gethostname() or owner.get("within", _namespace()) != _namespace()
    if elsewhere and "within" in owner and _falls_silent(lock, content):  # earlier versions give no signs
        return content
    if elsewhere or (psutil.pid_exists(pid) and started == _started(pid)):
        where = f" on {host}" if elsewhere else ""
        raise UserError(
            f"A training runs in {lock.parent} already (process {pid}{where}). Wait for it, choose another "
            f"run folder, or delete {lock} if that process is gone."
        )
    return content


def _falls_silent(lock: Path, content: str) -> bool:
    """Whether the owner of a lock with this content gives no sign of life for so long that it is dead.

    How old a sign is, the clock of the file system says: those of two machines differ.
    """
    note(f"{lock.parent} is in use. Without a sign of life from there for {SILENCE} s this process goes on.")
    began, signs = time.monotonic(), set[float]()
    while len(signs) < 2:
        probe = part_of(lock)
        try:
            # Both are opened, or a network's file system may tell times of long ago.
            with probe.open("x") as new, lock.open() as file:
                now, signed = (os.fstat(one.fileno()).st_mtime for one in (new, file))
                if file.read() != content:
                    return False
        except FileNotFoundError:  # its owner has come to its end
            return True
        finally:
            probe.unlink(missing_ok=True)
        if max(now - signed, time.monotonic() - began) > SILENCE:
            return True
        signs.add(signed)
        time.sleep(SIGN / 3)
    return False


def _namespace() -> str:
    """Of the numbers of processes, "" where there is none: that of each container is its own."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str:
    """Start time of a process in kernel ticks, "" where it is unknown or the process is a zombie.

    A pid alone is not enough: after a restart (of a container, above all) another process may have it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
