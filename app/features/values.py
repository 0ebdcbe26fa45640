"""Feast's stored values, decoded by columns: `feast.types.Value` and `google.protobuf.Timestamp`.

A value is one field of a oneof: a tag (field number and wire type), then the content. Reading is
strict: bytes that protobuf would cut, merge or pass over are corrupt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Stored: TypeAlias = bytes | None
"""What Redis has for one field of one entity; None where there is no such field."""

_Column: TypeAlias = tuple[NDArray[Any], list[int]]
_Decoder: TypeAlias = Callable[[Sequence[Stored]], _Column]
_Collections: TypeAlias = Callable[[Callable[[Any], Any], bytes, Sequence[Stored]], _Column]
_Unpack: TypeAlias = Callable[[bytes, NDArray[np.intp]], tuple[NDArray[Any], NDArray[np.intp]]]
_T = TypeVar("_T")

# Below these a plain loop is faster than the calls of numpy.
_FEW_INTEGERS = 48
_FEW_TIMES = 24

_NO_TIME = -(1 << 63)
_NULLS = frozenset(
    [
        None,
        b"",
        b"\x98\x01\x00",  # null_val, field 19
        b"\x40" + b"\x80" * 9 + b"\x01",  # _NO_TIME, which Feast writes for pandas' NaT
    ]
)
_INT32 = (-(1 << 31), (1 << 31) - 1)
_INT64 = (-(1 << 63), (1 << 63) - 1)
_SECONDS = (-62_135_596_800, 253_402_300_799)
"""Of the years 1 to 9999: what a Timestamp and a datetime can hold."""
_EXACT_IN_FLOAT64 = 1 << 53


class Corrupt(Exception):
    """The bytes are no value of the declared type."""


def is_null(stored: Stored) -> bool:
    """Not stored, stored as an empty message, as Feast's explicit null or as its null time."""
    return stored in _NULLS


def decode_column(dtype: str, stored: Sequence[Stored]) -> _Column:
    """Values of one type of `DECODABLE`, and the places of those that are corrupt.

    Numbers and Bool become float64 with NaN as null; integers become exact ints with None as null
    where one of them is beyond ±2**53. All else is an array of objects with None as null: str,
    bytes, UTC datetimes; for an Array, numpy arrays of its numbers (or bools) or lists of such
    objects; for a Set, sets. The caller owns them all. A corrupt value is null and harms no other.
    """
    return _DECODERS[dtype](stored)


@dataclass(frozen=True, slots=True)
class FixedWidth:
    """Numbers that are stored as a tag and then always as many bytes."""

    tag: int
    layout: np.dtype[Any]

    @property
    def width(self) -> int:
        """Of a stored value, in bytes."""
        return 1 + self.layout.itemsize


def decode_times(stored: Sequence[Stored]) -> tuple[NDArray[np.float64], list[int]]:
    """Serialized `google.protobuf.Timestamp`s as seconds since 1970, and which are corrupt.

    NaN where there is none and where it is corrupt.
    """
    count = len(stored)
    if count < _FEW_TIMES:
        return _times_one_by_one(stored)
    if stored.count(stored[0]) == count:
        first, corrupt = _times_one_by_one(stored[:1])
        return first.repeat(count), list(range(count)) if corrupt else []
    return _times_at_once(stored)


def _times_one_by_one(stored: Sequence[Stored]) -> tuple[NDArray[np.float64], list[int]]:
    seconds, corrupt = [], []
    for index, value in enumerate(stored):
        try:
            seconds.append(_seconds(value))
        except Corrupt:
            seconds.append(np.nan)
            corrupt.append(index)
    return np.array(seconds, dtype=np.float64), corrupt


@lru_cache(maxsize=4096)  # what was materialized or pushed together has one time
def _seconds(stored: Stored) -> float:
    if stored is None:
        return np.nan
    if len(stored) == 6 and stored[0] == 0x08:  # whole seconds of 1978 to 2514: nearly always
        packed = int.from_bytes(stored[1:], "little")
        if packed & 0x80_8080_8080 == 0x80_8080_80:
            return float(_five_groups(packed))
    seconds, nanos, position = 0, 0, 0
    while position < len(stored):
        tag = stored[position]
        number, position = _varint(stored, position + 1)
        if tag == 0x08:
            seconds = _signed(number)
        elif tag == 0x10:
            nanos = number
        else:
            raise Corrupt
    if not _SECONDS[0] <= seconds <= _SECONDS[1] or nanos >= 1_000_000_000:
        raise Corrupt
    return seconds + nanos / 1e9


def _five_groups(packed: int) -> int:
    """The five groups of 7 bits of a varint, its bytes read as one number, put together."""
    return (
        packed & 0x7F
        | (packed & 0x7F00) >> 1
        | (packed & 0x7F0000) >> 2
        | (packed & 0x7F000000) >> 3
        | (packed & 0x7F00000000) >> 4
    )


def _times_at_once(stored: Sequence[Stored]) -> tuple[NDArray[np.float64], list[int]]:
    """Those of one length whose seconds take 5 bytes (1978 to 2514) as one, the others one by
    one."""
    of_length: dict[int, list[int]] = {}
    for index, value in enumerate(stored):
        of_length.setdefault(-1 if value is None else len(value), []).append(index)
    seconds, others = np.empty(len(stored)), []
    for length, indexes in of_length.items():
        if length not in TIME_LENGTHS:
            others += indexes
            continue
        joined = b"".join([stored[index] for index in indexes])  # type: ignore[misc]  # not None
        found = np.frombuffer(joined, np.uint8).reshape(-1, length)
        seconds[indexes], wrong = times_from_bits(found)
        mask, content = (np.frombuffer(bits, np.uint8) for bits in time_bits(length))
        wrong = wrong | ((found & mask) != content).any(axis=1)
        if wrong.any():
            others += np.array(indexes)[wrong].tolist()
    if not others:
        return seconds, []
    others.sort()
    seconds[others], corrupt = _times_one_by_one([stored[index] for index in others])
    return seconds, [others[index] for index in corrupt]


SHORTEST_TIME, LONGEST_TIME = 6, 12
TIME_LENGTHS = frozenset({SHORTEST_TIME, *range(8, LONGEST_TIME + 1)})
"""Of Timestamps whose seconds take 5 bytes: all of the years 1978 to 2514 that protobuf writes. The
shortest have whole seconds."""


_NO_NANOS = b"\x10\x80\x80\x80\x80\x00"
TIME_ENDS: Mapping[int, Mapping[bytes, bytes]] = {
    SHORTEST_TIME: {bytes([end]): bytes([end]) + _NO_NANOS for end in range(0x80)},
    **{
        length: {
            bytes([end]): bytes([end | 0x80]) + _NO_NANOS[length - LONGEST_TIME :]
            for end in range(0x80)
        }
        for length in range(8, LONGEST_TIME)
    },
    LONGEST_TIME: {bytes([end]): bytes([end]) for end in range(0x80)},
}
"""By the length and the last byte of a Timestamp: what is instead of that byte where the Timestamp
takes as many bytes as any."""


def time_bits(length: int) -> tuple[bytes, bytes]:
    """What a Timestamp of one of `TIME_LENGTHS` looks like: which of its bits are always the same,
    and what they are."""
    seconds = b"\xff" + b"\x80" * 5, b"\x08" + b"\x80" * 4 + b"\x00"
    if length == 6:
        return seconds
    more = length - 8  # bytes of the nanoseconds but the last
    return (
        seconds[0] + b"\xff" + b"\x80" * (more + 1),
        seconds[1] + b"\x10" + b"\x80" * more + b"\x00",
    )


def times_from_bits(
    stored: NDArray[np.uint8],
) -> tuple[NDArray[np.float64], NDArray[np.bool_] | bool]:
    """The seconds since 1970 of Timestamps `[n, length]`, n > 0, that look as `time_bits` says, and
    which of them are corrupt all the same; False if none."""
    parts: NDArray[np.float64] = (stored & 0x7F).dot(_TIME_PLACES[stored.shape[1]])
    if stored.shape[1] == 6:
        return parts, False
    seconds, nanos = parts[:, 0], parts[:, 1]
    wrong = nanos >= 1e9 if nanos.max() >= 1e9 else False
    return seconds + nanos / 1e9, wrong


def _floats(tag: int, layout: np.dtype[Any], stored: Sequence[Stored]) -> _Column:
    values = _of_one_width(tag, layout, stored)
    corrupt: list[int] = []
    if values is None:
        null = bytes([tag]) + np.array(np.nan, layout).tobytes()
        filled = [value or null for value in stored]
        values = _of_one_width(tag, layout, filled)
        if values is None:
            fits = [len(value) == len(null) and value[0] == tag for value in filled]
            corrupt = _corrupt(stored, np.array(fits))
            fitting = [v if fit else null for v, fit in zip(filled, fits, strict=True)]
            values = np.frombuffer(b"".join(v[1:] for v in fitting), layout)
    with np.errstate(invalid="ignore"):  # a stored NaN may be of the signalling kind
        return values.astype(np.float64), corrupt


def _bools(stored: Sequence[Stored]) -> _Column:
    values = _of_one_width(0x38, _U1, stored)
    if values is None or (values > 1).any():
        return _integers(0x38, (0, 1), stored)
    return values.astype(np.float64), []


def _of_one_width(tag: int, layout: np.dtype[Any], stored: Sequence[Stored]) -> NDArray[Any] | None:
    """What follows the tags, where all are stored with this tag and width: a view of one join."""
    width = 1 + layout.itemsize
    try:
        if set(map(len, stored)) != {width}:  # type: ignore[arg-type]  # None raises TypeError
            return None
    except TypeError:
        return None
    joined = b"".join(stored)  # type: ignore[arg-type]  # none is None
    if joined[::width].count(tag) != len(stored):
        return None
    return np.ndarray((len(stored),), layout, joined, 1, (width,))


def _integers(tag: int, limits: tuple[int, int], stored: Sequence[Stored]) -> _Column:
    if len(stored) < _FEW_INTEGERS:
        numbers, corrupt = _each(partial(_integer, tag, limits), stored)
        if limits == _INT64 and any(n is not None and abs(n) > _EXACT_IN_FLOAT64 for n in numbers):
            return _objects(numbers), corrupt
        return np.array(numbers, dtype=np.float64), corrupt  # None becomes NaN
    values, fits = _integers_at_once(tag, limits, stored)
    exact = (values <= _EXACT_IN_FLOAT64) & (values >= -_EXACT_IN_FLOAT64)
    column: NDArray[Any]
    if (exact | ~fits).all():
        column = values.astype(np.float64)
        column[~fits] = np.nan
    else:
        column = values.astype(object)
        column[~fits] = None
    return column, _corrupt(stored, fits)


def _moments(stored: Sequence[Stored]) -> _Column:
    if len(stored) < _FEW_INTEGERS:
        seconds, corrupt = _each(partial(_integer, 0x40, _SECONDS), stored)
    else:
        values, fits = _integers_at_once(0x40, _SECONDS, stored)
        values[~fits] = _NO_TIME
        seconds, corrupt = values.tolist(), _corrupt(stored, fits)
    return _objects(_datetimes(seconds)), corrupt


def _datetimes(seconds: Sequence[int | None]) -> list[datetime | None]:
    return [None if s is None or s == _NO_TIME else datetime.fromtimestamp(s, UTC) for s in seconds]


def _integers_at_once(
    tag: int, limits: tuple[int, int], stored: Sequence[Stored]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The integers, and which of them are what the bytes say."""
    heap = _Heap.of(stored)
    values, fits = _varints(heap, 1)
    fits &= heap.at(0, _U1) == tag
    if limits != _INT64:
        fits &= (values >= limits[0]) & (values <= limits[1])
    return values, fits


def _texts(stored: Sequence[Stored]) -> _Column:
    """Each distinct text is decoded once: texts are often categories."""
    distinct = list(set(stored))
    values, corrupt = _each(_text, distinct)
    text_of = dict(zip(distinct, values, strict=True))
    column = _objects([text_of[value] for value in stored])
    if not corrupt:
        return column, []
    broken = {distinct[index] for index in corrupt}
    return column, [index for index, value in enumerate(stored) if value in broken]


def _one_by_one(decode: Callable[[bytes], Any], stored: Sequence[Stored]) -> _Column:
    values, corrupt = _each(decode, stored)
    return _objects(values), corrupt


def _each(
    decode: Callable[[bytes], _T], stored: Sequence[Stored]
) -> tuple[list[_T | None], list[int]]:
    values: list[_T | None] = []
    corrupt = []
    for index, value in enumerate(stored):
        try:
            values.append(decode(value) if value else None)
        except (Corrupt, UnicodeDecodeError):
            values.append(None)
            if not is_null(value):
                corrupt.append(index)
    return values, corrupt


def _corrupt(stored: Sequence[Stored], fits: NDArray[np.bool_]) -> list[int]:
    """The places of those that neither fit nor are null."""
    if fits.all():
        return []
    return [index for index in np.flatnonzero(~fits).tolist() if not is_null(stored[index])]


def _objects(values: Sequence[Any]) -> NDArray[Any]:
    return np.fromiter(values, dtype=object, count=len(values))  # np.array would open lists


def _integer(tag: int, limits: tuple[int, int], value: bytes) -> int:
    """As `_varint` and `_signed` after the tag, but faster."""
    number = value[-1]
    if value[0] != tag or number >= 0x80 or not 2 <= len(value) <= 11:
        raise Corrupt
    for byte in value[-2:0:-1]:
        number = number << 7 | byte - 0x80  # a byte that ends a number makes all negative
    if not 0 <= number < 1 << 64:
        raise Corrupt
    number = _signed(number)
    if not limits[0] <= number <= limits[1]:
        raise Corrupt
    return number


def _bytes(value: bytes) -> bytes:
    return value[_inside(b"\x0a", value) :]


def _text(value: bytes) -> str:
    length = len(value) - 2
    if 0 <= length < 0x80 and value[0] == 0x12 and value[1] == length:
        return value[2:].decode()
    return value[_inside(b"\x12", value) :].decode()


def _inside(tag: bytes, value: bytes) -> int:
    """Where the content begins that has a length and ends with the value."""
    if not value.startswith(tag):
        raise Corrupt
    length, start = _varint(value, len(tag))
    if start + length != len(value):
        raise Corrupt
    return start


def _pieces(tag: bytes, value: bytes) -> list[bytes]:
    """The elements of a list of texts or bytes."""
    position = _inside(tag, value)
    pieces = []
    while position < len(value):
        if value[position] != _RUN:
            raise Corrupt
        length, start = _varint(value, position + 1)
        position = start + length
        if position > len(value):
            raise Corrupt
        pieces.append(value[start:position])
    return pieces


def _piece_collections(
    read: Callable[[bytes], Any],
    finish: Callable[[list[Any]], Any],
    tag: bytes,
    stored: Sequence[Stored],
) -> _Column:
    return _one_by_one(lambda value: finish([read(piece) for piece in _pieces(tag, value)]), stored)


def _number_collections(
    elements: "_Elements",
    finish: Callable[[NDArray[Any]], Any],
    tag: bytes,
    stored: Sequence[Stored],
) -> _Column:
    """All lists are unpacked as one; where that fails, each by itself."""
    runs, corrupt = _each(partial(elements.run, tag), stored)
    try:
        lists = elements.lists(runs)
    except Corrupt:
        lists = []
        for index, run in enumerate(runs):
            try:
                lists += elements.lists([run])
            except Corrupt:
                lists.append(None)
                corrupt.append(index)
        corrupt.sort()
    return _objects([None if numbers is None else finish(numbers) for numbers in lists]), corrupt


@dataclass(frozen=True, slots=True)
class _Elements:
    """The numbers of lists, each list as one run of bytes without gaps.

    Usually they are stored so; protobuf may also put the element's own `tag` before each, and mix
    both. `width` is in bytes, 0 for varints. `unpack` reads many runs, joined, given where each
    ends: it returns their numbers and where those of each end, or raises `Corrupt`.
    """

    tag: int
    width: int
    unpack: _Unpack

    def run(self, tag: bytes, value: bytes) -> bytes:
        """The run of a stored list. Raises `Corrupt`."""
        position = _inside(tag, value)
        runs = []
        while position < len(value):
            if value[position] == _RUN:
                length, position = _varint(value, position + 1)
                end = position + length
            elif value[position] == self.tag:
                position += 1
                end = position + self.width if self.width else _varint(value, position)[1]
            else:
                raise Corrupt
            run = value[position:end]
            cut = len(run) % self.width if self.width else run and run[-1] >= 0x80
            if cut or end > len(value):
                raise Corrupt
            runs.append(run)
            position = end
        return b"".join(runs)

    def lists(self, runs: Sequence[bytes | None]) -> list[NDArray[Any] | None]:
        """Raises `Corrupt`."""
        present = [run or b"" for run in runs]
        ends = np.cumsum([len(run) for run in present], dtype=np.intp)
        numbers, stops = self.unpack(b"".join(present), ends)
        return [
            None if run is None else numbers[start:stop]
            for run, (start, stop) in zip(runs, pairwise([0, *stops.tolist()]), strict=True)
        ]


def _unpack_floats(
    layout: np.dtype[Any], joined: bytes, ends: NDArray[np.intp]
) -> tuple[NDArray[Any], NDArray[np.intp]]:
    native = layout.newbyteorder("=")
    return np.frombuffer(joined, layout).astype(native), ends // layout.itemsize


def _unpack_bools(
    joined: bytes, ends: NDArray[np.intp]
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    octets = np.frombuffer(joined, _U1)
    if (octets > 1).any():
        raise Corrupt
    return octets.astype(np.bool_), ends


def _unpack_integers(
    limits: tuple[int, int], joined: bytes, ends: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    octets = np.frombuffer(joined, _U1)
    if joined.isascii():  # each byte is a number
        return octets.astype(np.int64), ends
    lasts = np.flatnonzero(octets < 0x80)
    lengths = np.diff(lasts, prepend=-1)
    values, fits = _varints(_Heap(joined + _PADDING, lasts + 1 - lengths, lengths), 0)
    fits &= (values >= limits[0]) & (values <= limits[1])
    if not fits.all():
        raise Corrupt
    return values, np.searchsorted(lasts, ends)


def _unpack_int32(
    joined: bytes, ends: NDArray[np.intp]
) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    values, stops = _unpack_integers(_INT32, joined, ends)
    return values.astype(np.int32), stops


def _unpack_seconds(
    joined: bytes, ends: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    values, stops = _unpack_integers(_INT64, joined, ends)
    if not (((values >= _SECONDS[0]) & (values <= _SECONDS[1])) | (values == _NO_TIME)).all():
        raise Corrupt
    return values, stops


@dataclass(frozen=True, slots=True)
class _Heap:
    """Pieces of one run of bytes, which ends in `_PADDING`."""

    joined: bytes
    starts: NDArray[np.intp]
    lengths: NDArray[np.intp]

    @classmethod
    def of(cls, stored: Sequence[Stored]) -> Self:
        """One piece for each; nothing has none of the bytes."""
        try:
            joined = b"".join(stored)  # type: ignore[arg-type]  # None raises TypeError
        except TypeError:
            return cls.of([value or b"" for value in stored])
        lengths = np.fromiter(map(len, stored), np.intp, len(stored))  # type: ignore[arg-type]
        return cls(joined + _PADDING, lengths.cumsum() - lengths, lengths)

    def at(self, offset: int, layout: np.dtype[Any]) -> NDArray[Any]:
        """What begins `offset` bytes into each piece, whether or not the piece is so long."""
        size = len(self.joined) - offset - layout.itemsize + 1
        return np.ndarray((size,), layout, self.joined, offset, (1,))[self.starts]


def _varints(heap: _Heap, offset: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The signed 64-bit varints that fill each piece from `offset` to its end, and which do so."""
    sizes = np.minimum(heap.lengths, _SIZES - 8) - offset
    low = heap.at(offset, _U8) & _LOW_BYTES[sizes]
    fits = (low & _MORE_OF_8) == _LOW_MORE[sizes]
    values = _join_groups(low & _GROUPS_OF_8)
    if (sizes > 8).any():
        high = heap.at(offset + 8, _U2).astype(np.uint64) & _HIGH_BYTES[sizes]
        fits &= (high & 0xFE80) == _HIGH_MORE[sizes]  # the 64th bit is the lowest of byte 10
        values |= (high & 0x7F) << 56 | (high >> 8) << 63
    return values.view(np.int64), fits


def _join_groups(groups: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The numbers that up to 8 groups of 7 bits make, one in each byte, the lowest first."""
    for shift, odd in _SHIFTS:
        upper = groups & odd
        groups = groups - upper + (upper >> shift)
    return groups


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An unsigned 64-bit number of 7 bits a byte, the lowest first, and where it ends."""
    number = shift = 0
    for index in range(position, min(position + 10, len(data))):
        byte = data[index]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            if number >> 64:
                raise Corrupt
            return number, index + 1
        shift += 7
    raise Corrupt


def _signed(number: int) -> int:
    """Negative numbers are written as their 64-bit two's complement."""
    return number - (1 << 64) if number >= 1 << 63 else number


_RUN = 0x0A  # in a list: field 1 with a length
_U1, _U2, _U8 = np.dtype("u1"), np.dtype("<u2"), np.dtype("<u8")
_F4, _F8 = np.dtype("<f4"), np.dtype("<f8")
_PADDING = bytes(24)  # so that what begins in the last piece does not end outside


def _by_size(
    numbers: Sequence[int], otherwise: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Tables by the size of a varint, 1 to 10 bytes: the lowest 8 bytes of `numbers`, the others.

    They are long enough for the sizes of pieces that hold no varint, negative ones among them.
    """
    rows = [otherwise] * _SIZES
    rows[1:11] = numbers
    low = np.array([row & (1 << 64) - 1 for row in rows], dtype=np.uint64)
    return low, np.array([row >> 64 for row in rows], dtype=np.uint64)


def _time_places(length: int) -> NDArray[np.float64]:
    """What each byte of a Timestamp counts, in its seconds and in its nanoseconds."""
    places = np.zeros((length, 2))
    places[1:6, 0] = [1 << 7 * place for place in range(5)]
    places[7:, 1] = [1 << 7 * place for place in range(max(length - 7, 0))]
    return places if length > 6 else places[:, 0].copy()


_TIME_PLACES = {length: _time_places(length) for length in TIME_LENGTHS}

# Neighbours are joined in pairs, then these: how far those at odd places move, and where they are.
_SHIFTS = [
    (np.uint64(1), np.uint64(0x7F00_7F00_7F00_7F00)),
    (np.uint64(2), np.uint64(0x3FFF_0000_3FFF_0000)),
    (np.uint64(4), np.uint64(0x0FFF_FFFF_0000_0000)),
]
_GROUPS_OF_8, _MORE_OF_8 = np.uint64(0x7F7F_7F7F_7F7F_7F7F), np.uint64(0x8080_8080_8080_8080)
_SIZES = 32
# Which bytes a varint has, and which of their highest bits are set: all but the last byte's. (A
# lowest bit never is among the highest: no varint fits where there is none.)
_LOW_BYTES, _HIGH_BYTES = _by_size([(1 << 8 * size) - 1 for size in range(1, 11)], 0)
_LOW_MORE, _HIGH_MORE = _by_size(
    [int.from_bytes(b"\x80" * (size - 1), "little") for size in range(1, 11)], 1
)


def _numbers(tag: int, width: int, unpack: _Unpack) -> _Collections:
    return partial(_number_collections, _Elements(tag, width, unpack))


def _array(numbers: NDArray[Any]) -> NDArray[Any]:
    return numbers


def _set(numbers: NDArray[Any]) -> set[Any]:
    return set(numbers.tolist())


def _list_of_moments(seconds: NDArray[Any]) -> list[datetime | None]:
    return _datetimes(seconds.tolist())


def _set_of_moments(seconds: NDArray[Any]) -> set[datetime | None]:
    return set(_datetimes(seconds.tolist()))


def _length_tag(field: int) -> bytes:
    """The tag of a field that has a length."""
    number = field << 3 | 2
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80, number >> 7])


_SCALARS: Mapping[str, _Decoder] = {
    "Bytes": partial(_one_by_one, _bytes),
    "String": _texts,
    "Int32": partial(_integers, 0x18, _INT32),
    "Int64": partial(_integers, 0x20, _INT64),
    "Float64": partial(_floats, 0x29, _F8),
    "Float32": partial(_floats, 0x35, _F4),
    "Bool": _bools,
    "UnixTimestamp": _moments,
}

# How each collection is read, what makes an Array of it and what a Set. Feast numbers the fields of
# Arrays from 11 and those of Sets from 22, in this order.
_COLLECTIONS: Mapping[str, tuple[_Collections, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "Bytes": (partial(_piece_collections, bytes), list, set),
    "String": (partial(_piece_collections, bytes.decode), list, set),
    "Int32": (_numbers(0x08, 0, _unpack_int32), _array, _set),
    "Int64": (_numbers(0x08, 0, partial(_unpack_integers, _INT64)), _array, _set),
    "Float64": (_numbers(0x09, 8, partial(_unpack_floats, _F8)), _array, _set),
    "Float32": (_numbers(0x0D, 4, partial(_unpack_floats, _F4)), _array, _set),
    "Bool": (_numbers(0x08, 0, _unpack_bools), _array, _set),
    "UnixTimestamp": (_numbers(0x08, 0, _unpack_seconds), _list_of_moments, _set_of_moments),
}

_DECODERS: Mapping[str, _Decoder] = {
    **_SCALARS,
    **{
        f"{kind}({name})": partial(read, finish, _length_tag(first_field + place))
        for place, (name, (read, *finishes)) in enumerate(_COLLECTIONS.items())
        for kind, first_field, finish in zip(("Array", "Set"), (11, 22), finishes, strict=True)
    },
}

FIXED_WIDTH: Mapping[str, FixedWidth] = {
    "Float32": FixedWidth(0x35, _F4),
    "Float64": FixedWidth(0x29, _F8),
}
"""Feast types of which every value that is no null has the same width."""

DECODABLE = frozenset(_DECODERS)
"""Feast types that these decoders know."""
