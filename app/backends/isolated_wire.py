"""What a server and its isolated process say to each other: a JSON header and raw tensors a frame.

A frame is `<header bytes: u32><zero: u32><payload bytes: u64>`, the header padded with spaces to a
multiple of 16, and the payload: the tensors one after another, each padded to a multiple of 16. A
tensor is its numbers in C order; one of texts is their UTF-8 lengths (u32 each) and then the bytes.
"""

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from app.errors import BackendError
from app.tensors import Signature, Tensor, Tensors, TensorSpec

Bytes: TypeAlias = NDArray[np.uint8]

_PREFIX = struct.Struct("<IIQ")
_ALIGNED = 16  # what numpy gives an array, so that no number of a tensor lies across two words
_MAX_HEADER = 1 << 20
_RECEIVE = 1 << 16
_MAX_AXES = 32
# Of one answer; every text takes an object, and time in the server's event loop.
_MAX_BYTES, _MAX_BYTES_A_ROW = 64 << 20, 16 << 20
_MAX_TEXTS, _MAX_TEXTS_A_ROW = 16_384, 64
_MAX_TEXT_BYTES, _MAX_TEXT_BYTES_A_ROW = 4 << 20, 16 << 10
_NUMBERS = {
    name: np.dtype(name)
    for name in (
        *("bool", "float16", "float32", "float64"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
}
_NAMES = {dtype: name for name, dtype in _NUMBERS.items()}  # `dtype.name` takes 4 µs


class TensorHeader(msgspec.Struct, array_like=True, frozen=True):
    """A tensor of the payload, which takes `size` bytes of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


class Inspection(msgspec.Struct, frozen=True):
    """Look at the file before the runtime sees it. `files` are those beside it that it may name as
    external data; None: any regular file of its folder."""

    files: tuple[str, ...] | None


class Open(msgspec.Struct, tag="open", frozen=True):
    """The first frame: confine yourself, then open the model. Answered by `Ready` or `Refused`."""

    parent: int
    memory_mb: int
    options: dict[str, Any]
    model: str
    signature: Signature
    workers: int
    inspect: Inspection | None = None


class Run(msgspec.Struct, tag="run", frozen=True):
    """Execute the tensors, or with `warm_up_rows` warm up with them. Answered by `Ran` or
    `Failed`."""

    id: int
    deadline_s: float
    tensors: tuple[TensorHeader, ...]
    warm_up_rows: int | None = None

    @property
    def rows(self) -> int:
        """Of its tensors, which all have the same number."""
        shape = self.tensors[0].shape if self.tensors else ()
        return shape[0] if shape else 0


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is open. `gaps` says from what the kernel could not keep the process,
    `resident_bytes` what it held in memory before it opened the model; 0 where nobody asked."""

    signature: Signature
    concurrency: int
    gaps: tuple[str, ...]
    resident_bytes: int = 0


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The model cannot be opened."""

    reason: str


class Ran(msgspec.Struct, tag="ran", frozen=True):
    id: int
    tensors: tuple[TensorHeader, ...]


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """`error` is the code of a request error."""

    id: int
    error: str
    reason: str


Message: TypeAlias = Open | Run | Ready | Refused | Ran | Failed

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


class WireError(Exception):
    """What was received is no frame of ours: whoever sent it is not to be trusted further."""


@dataclass(frozen=True, slots=True)
class Frame:
    message: Message
    payload: Bytes = field(repr=False)


def frame(message: Message, tensors: Sequence[memoryview] = ()) -> list[memoryview]:
    """The buffers to send, in order; none is copied."""
    header = _encoder.encode(message)
    header += b" " * (-len(header) % _ALIGNED)
    payload = sum(part.nbytes for part in tensors)
    return [memoryview(_PREFIX.pack(len(header), 0, payload) + header), *tensors]


class FrameReader:
    """Makes frames of received bytes: receive into `space()`, then say how many to `received()`.

    Nothing larger than `max_payload()` bytes is taken: more raises `WireError`, and so does what is
    no frame.
    """

    def __init__(self, max_payload: Callable[[], int]) -> None:
        self._max_payload = max_payload
        self._buffer: Bytes = np.empty(_RECEIVE, np.uint8)
        self._filled = 0

    def space(self) -> memoryview:
        return self._buffer.data[self._filled :]

    def received(self, count: int) -> Iterator[Frame]:
        """The frames that are whole now. Take all of them before receiving again."""
        self._filled += count
        start = 0
        while (end := self._end(start)) is not None and end <= self._filled:
            yield self._frame(start, end)
            start = end
        self._keep(start, self._filled if end is None else end)

    def _end(self, start: int) -> int | None:
        """Where the frame that begins at `start` ends; None while its prefix is not there."""
        if self._filled - start < _PREFIX.size:
            return None
        header, zero, payload = _PREFIX.unpack_from(self._buffer.data, start)
        if zero or header > _MAX_HEADER or header % _ALIGNED or payload > self._max_payload():
            raise WireError(f"a frame of {header} + {payload} bytes")
        return int(start + _PREFIX.size + header + payload)

    def _frame(self, start: int, end: int) -> Frame:
        header_end = start + _PREFIX.size + _PREFIX.unpack_from(self._buffer.data, start)[0]
        try:
            message = _decoder.decode(self._buffer.data[start + _PREFIX.size : header_end])
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise WireError(f"a header that is none: {exc}") from exc
        payload = self._buffer[header_end:end]
        # A frame that has the buffer for itself takes it along.
        return Frame(message, payload if len(self._buffer) > _RECEIVE else payload.copy())

    def _keep(self, start: int, end: int) -> None:
        """Move the beginning of the next frame to the front, with room for all of it."""
        rest = self._buffer[start : self._filled]
        size = max(_RECEIVE, end - start)
        if size != len(self._buffer):
            self._buffer = np.empty(size, np.uint8)
            self._buffer[: len(rest)] = rest
        elif start and len(rest):
            self._buffer[: len(rest)] = rest.copy()
        self._filled = len(rest)


def encoded(tensors: Tensors) -> tuple[tuple[TensorHeader, ...], list[memoryview]]:
    """Headers and buffers, which are views where the numbers lie in C order.

    Raises `BackendError` for a tensor of a type that cannot be sent.
    """
    headers: list[TensorHeader] = []
    buffers: list[memoryview] = []
    for name, tensor in tensors.items():
        dtype = _NAMES.get(tensor.dtype, "str")
        data = _bytes_of(tensor) if dtype != "str" else _encoded_texts(name, tensor)
        headers.append(TensorHeader(name, dtype, tensor.shape, data.nbytes))
        buffers.append(data)
        if data.nbytes % _ALIGNED:
            buffers.append(memoryview(bytes(-data.nbytes % _ALIGNED)))
    return tuple(headers), buffers


def most_bytes(rows: int) -> int:
    """Of an answer to so many rows, in memory."""
    return _MAX_BYTES + rows * _MAX_BYTES_A_ROW


def check_answer(headers: Sequence[TensorHeader], specs: Sequence[TensorSpec], rows: int) -> None:
    """Raises `WireError` unless these are the tensors of an answer to `rows` rows.

    Nothing of the payload is looked at: what passes is decoded in bounded time and memory.
    """
    expected = {spec.name: spec for spec in specs}
    names = [header.name for header in headers]
    if len(names) != len(expected) or set(names) != expected.keys():
        raise WireError(f"{len(names)} outputs instead of {sorted(expected)}")
    for header in headers:
        spec = expected[header.name]
        wanted = (rows, *spec.shape)
        fits = len(header.shape) == len(wanted) and all(
            size >= 0 and length in (size, -1)
            for size, length in zip(header.shape, wanted, strict=True)
        )
        if header.dtype != spec.dtype or not fits or header.size < 0:
            raise WireError(
                f"output {header.name!r} is {header.dtype}{list(header.shape)} "
                f"instead of {spec.dtype}{list(wanted)}"
            )
    if sum(header.size for header in headers) > most_bytes(rows):
        raise WireError(f"more than {most_bytes(rows)} bytes for {rows} rows")
    texts = [header for header in headers if header.dtype == "str"]
    if sum(math.prod(text.shape) for text in texts) > _MAX_TEXTS + rows * _MAX_TEXTS_A_ROW:
        raise WireError(f"too many texts for {rows} rows")
    if sum(text.size for text in texts) > _MAX_TEXT_BYTES + rows * _MAX_TEXT_BYTES_A_ROW:
        raise WireError(f"too long texts for {rows} rows")


def decoded(headers: Sequence[TensorHeader], payload: Bytes) -> dict[str, Tensor]:
    """Views of the payload; texts are copied. Raises `WireError` unless the headers describe it."""
    tensors: dict[str, Tensor] = {}
    start = 0
    for header in headers:
        if header.size < 0 or start + header.size > len(payload) or header.name in tensors:
            raise WireError(f"tensor {header.name!r} is not in its frame")
        data = payload[start : start + header.size]
        try:
            tensors[header.name] = _decoded_tensor(header, data)
        except (ValueError, OverflowError) as exc:  # no array can have this shape
            raise WireError(f"tensor {header.name!r}: {exc}") from exc
        start += header.size + (-header.size % _ALIGNED)
    if start != len(payload):
        raise WireError(f"{len(payload) - start} bytes too many")
    return tensors


def _decoded_tensor(header: TensorHeader, data: Bytes) -> Tensor:
    if not 0 < len(header.shape) <= _MAX_AXES or min(header.shape) < 0:
        raise WireError(f"tensor {header.name!r} has shape {header.shape}")
    if header.dtype == "str":
        return _decoded_texts(header, data)
    dtype = _NUMBERS.get(header.dtype)
    if dtype is None or math.prod(header.shape) * dtype.itemsize != header.size:
        raise WireError(f"{header.size} bytes are no {header.dtype}{list(header.shape)}")
    return data.view(dtype).reshape(header.shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def _encoded_texts(name: str, tensor: Tensor) -> memoryview:
    if tensor.dtype.kind not in "OU":
        raise BackendError(f"{name}: {tensor.dtype} cannot be sent to an isolated process")
    try:
        texts = [text.encode() for text in tensor.ravel().tolist()]
    except (AttributeError, UnicodeEncodeError) as exc:
        raise BackendError(f"{name}: holds what is no text: {exc}") from exc
    lengths = np.fromiter(map(len, texts), "<u4", len(texts))
    return memoryview(lengths.tobytes() + b"".join(texts))


def _decoded_texts(header: TensorHeader, data: Bytes) -> Tensor:
    count = math.prod(header.shape)
    if 4 * count > len(data):
        raise WireError(f"{len(data)} bytes are no {count} texts")
    ends = 4 * count + np.cumsum(data[: 4 * count].view("<u4"), dtype=np.int64)
    if (ends[-1] if count else 0) != len(data):
        raise WireError(f"{count} texts do not end where their tensor {header.name!r} does")
    content = data.tobytes()
    texts = np.empty(count, object)
    start = 4 * count
    try:
        for at, end in enumerate(ends.tolist()):
            texts[at] = content[start:end].decode()
            start = end
    except UnicodeDecodeError as exc:
        raise WireError(f"tensor {header.name!r} holds what is no text") from exc
    return texts.reshape(header.shape)
