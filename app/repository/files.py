"""Files below a folder: opened without following a symbolic link, copied and synced to disk."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

PIECE_BYTES = 1 << 20

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK a named pipe would be waited for.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_regular(folder: Path, name: str) -> BufferedReader:
    """Open the regular file `name`, its parts divided by `/`, below `folder`.

    No symbolic link below `folder` is followed: a link, a pipe or a device is an `OSError` with
    ELOOP or ENOTDIR; what is not there is a `FileNotFoundError`.
    """
    *above, last = name.split("/")
    handle = os.open(folder, _FOLDER)
    try:
        for part in above:
            below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = below
        file = os.open(last, _FILE, dir_fd=handle)
    finally:
        os.close(handle)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.ELOOP, "not a regular file")
    return os.fdopen(file, "rb")


def is_no_regular_file(exc: OSError) -> bool:
    """Whether `open_regular` met something else than folders and a regular file."""
    return exc.errno in {errno.ELOOP, errno.ENOTDIR, errno.EISDIR}


def pieces(file: BufferedReader) -> Iterator[bytes]:
    """The content of an open file, which is closed afterwards."""
    with file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def regular_files(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, sorted. Raises `OSError` for a symbolic
    link and whatever else is neither file nor folder."""
    found: list[str] = []
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            found += [f"{entry.name}/{name}" for name in regular_files(Path(entry.path))]
        elif entry.is_file(follow_symlinks=False):
            found.append(entry.name)
        else:
            raise OSError(errno.ELOOP, "neither a regular file nor a folder", entry.path)
    return sorted(found)


def copy_synced(content: Iterator[bytes], to: Path) -> tuple[str, int]:
    """Write a new file and sync it; its sha256 and size. The folders above it are made."""
    to.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with to.open("xb") as file:
        for piece in content:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, _FOLDER)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folders(folder: Path) -> None:
    """The folder and every folder below it, the lowest first."""
    for path, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(path))


def remove_older_than(folder: Path, prefix: str, age_s: float, now_s: float) -> None:
    """Remove what begins with `prefix` and was last changed so long before `now_s`, an instant of
    that file system's clock. What somebody else removes at the same time is left to him."""
    for entry in _entries(folder):
        if not entry.name.startswith(prefix):
            continue
        with suppress(FileNotFoundError):
            if now_s - entry.stat(follow_symlinks=False).st_mtime < age_s:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    with os.scandir(folder) as entries:
        return list(entries)
