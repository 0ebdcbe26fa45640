"""The files beside an ONNX file in which its tensors may lie: regular ones of its folder."""

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from app.errors import InvalidModel

_KEYS = {"location", "offset", "length", "checksum"}


@dataclass
class ExternalFiles:
    """`files` are the names that may be used (None: all of the folder), `but_not` one that may
    not."""

    folder: Path
    files: Sequence[str] | None
    but_not: str
    _sizes: dict[str, int] = field(default_factory=dict)
    _regions: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)

    def check(self, entries: Iterable[tuple[str, str]], size: int, where: str) -> None:
        """Raises `InvalidModel`, which begins with `where`, unless these entries of a tensor name
        `size` bytes of such a file."""
        given = list(entries)
        keys = [key for key, _ in given]
        if not all(is_printable(part) for entry in given for part in entry):
            raise InvalidModel(f"{where}: its external data {str(given)[:200]} cannot be printed")
        if not set(keys) <= _KEYS or len(set(keys)) < len(keys) or "location" not in keys:
            raise InvalidModel(f"{where}: its external data has the entries {sorted(keys)[:8]}")
        values = dict(given)
        location = values["location"]
        offset = _number(values.get("offset", "0"), "offset", where)
        length = _number(values.get("length", str(size)), "length", where)
        if length != size:
            raise InvalidModel(f"{where}: {length} bytes of external data for a shape of {size}")
        whole = self._size(location, where)
        if offset + length > whole:
            raise InvalidModel(
                f"{where}: its external data are the bytes {offset} to {offset + length} of "
                f"{location!r}, which has {whole}"
            )
        if length:
            self._regions.setdefault(location, []).append((offset, offset + length, where))

    def check_overlaps(self) -> None:
        """Raises `InvalidModel` where two tensors share bytes: a small file could fill any memory
        with them."""
        for location, regions in self._regions.items():
            regions.sort()
            for (_, end, one), (start, _, other) in pairwise(regions):
                if start < end:
                    raise InvalidModel(
                        f"{other}: its external data overlaps in {location!r} with that of another "
                        f"({one.rsplit(': ', 1)[-1]})"
                    )

    def _size(self, location: str, where: str) -> int:
        if location not in self._sizes:
            self._check_location(location, where)
            try:
                with open_file(self.folder, location) as file:
                    self._sizes[location] = os.fstat(file.fileno()).st_size
            except InvalidModel as exc:
                raise InvalidModel(f"{where}: external data: {exc}") from exc
        return self._sizes[location]

    def _check_location(self, location: str, where: str) -> None:
        path = PurePosixPath(location)
        reason = None
        if not location or "\\" in location or len(location) > 255:
            reason = "is no name of a file"
        elif path.is_absolute():
            reason = "is an absolute path: it must lie in the model's folder"
        elif ".." in path.parts:
            reason = "leads out of the model's folder"
        elif str(path) != location or path.parts[0] == "*":  # ORT: */_ORT_MEM_ADDR_/*, an address
            reason = "is not the plain path of a file in the model's folder"
        elif location == self.but_not:
            reason = "is the model file itself"
        elif self.files is not None and location not in self.files:
            reason = "is not listed in the manifest"
        if reason is not None:
            raise InvalidModel(f"{where}: its external data {location[:100]!r} {reason}")


def open_file(folder: Path, name: str) -> BinaryIO:
    """The regular file of that relative path, below the folder: no link is followed on the way, and
    no pipe waited for. Raises `InvalidModel` where it is none, or has another name too."""
    *folders, last = PurePosixPath(name).parts
    try:
        with ExitStack() as opened:
            at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, at)
            for each in folders:
                at = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                opened.callback(os.close, at)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            file = open(os.open(last, flags, dir_fd=at), "rb")  # noqa: SIM115  (the caller's)
    except OSError as exc:
        linked = exc.errno in (errno.ELOOP, errno.ENOTDIR)
        reason = "is a link, or lies behind one" if linked else exc.strerror
        raise InvalidModel(f"{folder / name}: {reason}") from exc
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise InvalidModel(f"{folder / name}: is not a regular file")
    if found.st_nlink != 1:
        file.close()
        raise InvalidModel(f"{folder / name}: is a hard link: it has {found.st_nlink} names")
    return file


def is_printable(text: object) -> bool:
    """False for what protobuf leaves as bytes: it is no UTF-8."""
    return isinstance(text, str) and text.isprintable()


def _number(text: str, what: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidModel(f"{where}: the {what} {text[:40]!r} of its external data is no number")
    return int(text)
