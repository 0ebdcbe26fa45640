"""Buckets: where predictions wait in Redis for their labels, as hashes of short binary fields.

A bucket has the predictions of 64 requests that a worker answered one after the other, or 64 rows
of one large request. While its values are short and it has at most 512 fields (Redis's
`hash-max-listpack-entries`), Redis keeps it as one piece of memory, a third of what single keys
take.
"""

import struct
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from app.labels.form import LabelForm
from app.request_ids import RequestId
from app.served_model import VersionId

_SHARED_INSTANCES = 8
"""So many of a request's first rows share the bucket with other requests."""
_PART_ROWS = 64

META = b"m"
"""The digest of the form of its rows."""
CHARGE = b"b"
"""What the bucket counts for, in bytes."""
ROW, CANDIDATE, LABEL, VERSION = b"r", b"c", b"l", b"v"
"""With what the names of the other fields begin."""

LABEL_VALUE = struct.Struct("<dd")
"""The label as a number (NaN: void), and when it arrived by feature time."""
_ROW_NAME = struct.Struct("<9sI")
_VERSION = struct.Struct("<I32s")
_BEGAN = struct.Struct("<Q")
_INDEX = struct.Struct("<H")
_NAME_BYTES = _ROW_NAME.size


class Keys:
    """The names of what is kept in Redis of a model's labels."""

    def __init__(self, model: str) -> None:
        self._prefix = f"hikyaku:labels:{model}:".encode()
        self.due = self._prefix + b"due"
        """Sorted set: each bucket by the last of its horizons."""
        self.charged = self._prefix + b"bytes"
        """What all buckets count for."""
        self.turn = self._prefix + b"turn"
        """Whose turn it is to look for buckets that are due."""
        self.changes = self._prefix + b"changes"
        """Grows with each change of a quality table."""

    def bucket(self, name: bytes) -> bytes:
        return self._prefix + b"bucket:" + name

    def writer(self, tag: bytes) -> bytes:
        """What a worker has written so far."""
        return self._prefix + b"writer:" + tag.hex().encode()

    def form(self, digest: bytes) -> bytes:
        return self._prefix + b"form:" + digest.hex().encode()

    def quality(self, digest: bytes, table: int) -> bytes:
        """List: quality tables of the form `table`, which add up to that of all predictions of this
        form."""
        return self._prefix + b"quality:%s:%d" % (digest.hex().encode(), table)


class Place(NamedTuple):
    """Where a prediction is kept: the name of its bucket, and its own in the bucket."""

    bucket: bytes
    name: bytes

    @classmethod
    def of(cls, request: RequestId, instance: int) -> "Place":
        bucket = request.tag + request.bucket.to_bytes(3)
        if instance >= _SHARED_INSTANCES:
            bucket += request.random + (instance // _PART_ROWS).to_bytes(4)
        return cls(bucket, _ROW_NAME.pack(request.random, instance))


def version_field(index: int, version: VersionId, began: int | None) -> tuple[bytes, bytes]:
    """Which version a row means by this index; of a candidate, in the trial that `began` so."""
    content = _VERSION.pack(version.version, bytes.fromhex(version.sha256))
    trial = b"" if began is None else _BEGAN.pack(began)
    return VERSION + _INDEX.pack(index), content + trial


def candidate_name(row: bytes, index: int) -> bytes:
    """Where the numbers of the candidate with this index are kept for the row."""
    return CANDIDATE + row + _INDEX.pack(index)


class Version(NamedTuple):
    """Which version it was; `sha256` is the digest of its manifest. Of a candidate, the generation
    of the release state in which it `began` to be shown requests; None of one that answers."""

    number: int
    sha256: str
    began: int | None = None


class Kept(msgspec.Struct, frozen=True):
    """What a bucket has: an element a row in every array.

    `names` of the rows; `rows` of the form's `row`; `labels` as numbers, NaN where void; whether
    there `is_labelled`, void included; when that was (`arrived_s`, NaN where it was not);
    `candidates`: what each said, `[rows, width]`, NaN where it said nothing; whether it was
    `shown` the row.
    """

    names: list[bytes]
    rows: NDArray[np.void]
    versions: dict[int, Version]
    labels: NDArray[np.float64]
    is_labelled: NDArray[np.bool_]
    arrived_s: NDArray[np.float64]
    candidates: dict[int, NDArray[np.float64]]
    shown: dict[int, NDArray[np.bool_]]


def read_bucket(form: LabelForm, fields: dict[bytes, bytes]) -> Kept:
    """Of all fields of a bucket whose rows are of this form; numbers and labels for rows that are
    not kept are passed over."""
    kinds: dict[bytes, list[bytes]] = {ROW: [], CANDIDATE: [], LABEL: [], VERSION: []}
    for field in fields:
        if (kind := field[:1]) in kinds:
            kinds[kind].append(field)
    # In the order of the requests, whatever the order in which Redis returns them.
    names = sorted(field[1:] for field in kinds[ROW])
    places = {name: place for place, name in enumerate(names)}
    rows = np.frombuffer(b"".join(fields[ROW + name] for name in names), form.row)
    labels = np.full(len(names), np.nan)
    arrived_s = np.full(len(names), np.nan)
    is_labelled = np.zeros(len(names), np.bool_)
    for field in kinds[LABEL]:
        place = places.get(field[1:])
        if place is not None:
            labels[place], arrived_s[place] = LABEL_VALUE.unpack(fields[field])
            is_labelled[place] = True
    candidates: dict[int, NDArray[np.float64]] = {}
    shown: dict[int, NDArray[np.bool_]] = {}
    for field in kinds[CANDIDATE]:
        place = places.get(field[1 : 1 + _NAME_BYTES])
        if place is not None:
            [index] = _INDEX.unpack(field[1 + _NAME_BYTES :])
            if index not in candidates:
                candidates[index] = np.full((len(names), form.width), np.nan)
                shown[index] = np.zeros(len(names), np.bool_)
            shown[index][place] = True
            candidates[index][place] = np.frombuffer(fields[field], "<f8")
    versions = {}
    for field in kinds[VERSION]:
        [index] = _INDEX.unpack(field[1:])
        number, sha256 = _VERSION.unpack_from(fields[field])
        trial = fields[field][_VERSION.size :]
        began = _BEGAN.unpack(trial)[0] if trial else None
        versions[index] = Version(number, sha256.hex(), began)
    return Kept(names, rows, versions, labels, is_labelled, arrived_s, candidates, shown)


def row_charge(form: LabelForm) -> int:
    """What a row counts for, in bytes, its label included, for which there must be room when it
    comes."""
    name, longest = 1 + _NAME_BYTES, form.row.itemsize
    return _charged(name + longest, longest) + _charged(name + LABEL_VALUE.size, longest)


def candidate_charge(form: LabelForm) -> int:
    """What the numbers of a candidate for a row count for, in bytes."""
    size = 8 * form.width
    return _charged(1 + _NAME_BYTES + 2 + size, size)


BUCKET_CHARGE = 600
"""Of a bucket itself: its key, its place among those that are due, its own fields."""
MOST_FIELDS = 480
"""Of a bucket with more, Redis keeps each field by itself."""
FIELD_CHARGE = 80
"""What that costs."""
_LONGEST = 64
"""So does a longer value."""
_ENTRY = 4
"""What Redis keeps beside a name and a value."""


def _charged(size: int, longest: int) -> int:
    # A tenth for the steps in which Redis allocates.
    return round(1.1 * (size + _ENTRY)) + (FIELD_CHARGE if longest > _LONGEST else 0)
