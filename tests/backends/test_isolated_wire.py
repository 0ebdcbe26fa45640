"""What passes between a server and its isolated process, and what is refused there."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app.backends.isolated_wire import (
    Frame,
    FrameReader,
    Ran,
    TensorHeader,
    WireError,
    check_answer,
    decoded,
    encoded,
    frame,
)
from app.errors import BackendError
from app.tensors import Tensor, TensorSpec

NUMBERS = ["bool", "float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint64"]
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(SHAPES)
    if draw(st.booleans()):
        tensor: Tensor = draw(hnp.arrays(draw(st.sampled_from(NUMBERS)), shape))
        return tensor
    size = int(np.prod(shape))
    texts = draw(st.lists(st.text(), min_size=size, max_size=size))
    filled: Tensor = np.array([*texts, None], object)[:-1].reshape(shape)
    return filled


def sent(number: int, named: Mapping[str, Tensor]) -> bytes:
    headers, buffers = encoded(named)
    return b"".join(frame(Ran(number, headers), buffers))


def received(content: bytes, pieces: Sequence[int] = ()) -> list[Frame]:
    """The frames of these bytes, which arrive in such pieces and then as they fit."""
    reader = FrameReader(lambda: 1 << 24)
    frames: list[Frame] = []
    sizes = iter(pieces)
    while content:
        space = reader.space()
        count = min(next(sizes, len(content)), len(space), len(content))
        space[:count] = content[:count]
        content = content[count:]
        frames += reader.received(count)
    return frames


@given(
    st.lists(st.dictionaries(st.text(max_size=8), tensors(), max_size=3), min_size=1, max_size=4),
    st.lists(st.integers(1, 300)),
)
def test_every_tensor_arrives_as_it_was_however_the_bytes_are_cut(
    executions: list[dict[str, Tensor]], pieces: list[int]
) -> None:
    content = b"".join(sent(number, named) for number, named in enumerate(executions))
    frames = received(content, pieces)
    assert len(frames) == len(executions)
    for number, (named, arrived) in enumerate(zip(executions, frames, strict=True)):
        assert isinstance(arrived.message, Ran)
        assert arrived.message.id == number
        outputs = decoded(arrived.message.tensors, arrived.payload)
        assert list(outputs) == list(named)
        for name, tensor in named.items():
            assert outputs[name].dtype == tensor.dtype
            np.testing.assert_array_equal(outputs[name], tensor)


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 100_000])
def test_frames_around_the_size_of_a_buffer_arrive(rows: int) -> None:
    x = np.random.default_rng(rows).random((rows, 32), np.float32)
    frames = received(b"".join(sent(number, {"x": x}) for number in range(3)))
    assert len(frames) == 3
    for arrived in frames:
        assert isinstance(arrived.message, Ran)
        outputs = decoded(arrived.message.tensors, arrived.payload)
        np.testing.assert_array_equal(outputs["x"], x)
        outputs["x"][:] = 0  # nothing of it is shared with another frame


@pytest.mark.parametrize(
    ("headers", "payload"),
    [
        ([("x", "float32", (2, 1), 4)], 16),
        ([("x", "float32", (2, 1), 64)], 16),
        ([("x", "float32", (2, 1), -8)], 16),
        ([("x", "float32", (-2, -1), 8)], 16),
        ([("x", "float32", (), 4)], 16),
        ([("x", "float32", (1,) * 33, 4)], 16),
        ([("x", "float32", (0, 2**62, 2**62), 0)], 0),
        ([("x", "float32", (0, 10**30), 0)], 0),
        ([("x", "object", (1,), 8)], 16),
        ([("x", "float32", (1,), 4)] * 2, 32),
        ([("x", "float32", (1,), 4)], 32),
        ([("x", "str", (9,), 8)], 16),
        ([("x", "str", (10**9,), 8)], 16),
        ([("x", "str", (1,), 16)], 16),
    ],
)
def test_headers_that_do_not_describe_their_payload_are_refused(
    headers: list[tuple[Any, ...]], payload: int
) -> None:
    with pytest.raises(WireError):
        decoded([TensorHeader(*header) for header in headers], np.full(payload, 255, np.uint8))


ANSWER = (TensorSpec("y", "float32", (2, -1)), TensorSpec("label", "str", (-1,)))
Y, LABEL = ("y", "float32", (3, 2, 5), 120), ("label", "str", (3, 1), 40)


def test_an_answer_that_fits_its_execution_is_taken() -> None:
    check_answer([TensorHeader(*Y), TensorHeader(*LABEL)], ANSWER, 3)


@pytest.mark.parametrize(
    "headers",
    [
        [Y],
        [Y, Y],
        [Y, LABEL, LABEL],
        [Y, ("other", "str", (3, 1), 40)],
        [("y", "float64", (3, 2, 5), 240), LABEL],
        [("y", "str", (3, 2, 5), 120), LABEL],
        [("y", "float32", (4, 2, 5), 160), LABEL],
        [("y", "float32", (3, 3, 5), 180), LABEL],
        [("y", "float32", (3, 2), 24), LABEL],
        [("y", "float32", (), 4), LABEL],
        [("y", "float32", (3, 2, -1), 24), LABEL],
        [("y", "float32", (3, 2, 1 << 24), 3 << 27), LABEL],
        [("y", "float32", (3, 2, 5), -(1 << 26)), ("label", "str", (3, 1), 1 << 26)],
        [Y, ("label", "str", (3, 1 << 20), 3 << 22)],
        [Y, ("label", "str", (3, 1), 1 << 26)],
    ],
    ids=[
        *("too few", "twice", "too many", "name", "dtype", "texts for numbers", "rows", "width"),
        *(
            "rank",
            "no rows",
            "negative",
            "bytes",
            "less than nothing",
            "number of texts",
            "length of texts",
        ),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_before_it_is_decoded(
    headers: list[tuple[Any, ...]],
) -> None:
    with pytest.raises(WireError):
        check_answer([TensorHeader(*header) for header in headers], ANSWER, 3)


def test_texts_that_are_no_text_are_refused() -> None:
    payload = np.frombuffer(struct.pack("<I", 2) + b"\xff\xfe" + bytes(10), np.uint8)
    with pytest.raises(WireError, match="no text"):
        decoded([TensorHeader("x", "str", (1,), 6)], payload)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<IIQ", 16, 0, 1 << 40),  # a payload over the limit
        struct.pack("<IIQ", 1 << 30, 0, 0),  # a header over it
        struct.pack("<IIQ", 16, 1, 0),
        struct.pack("<IIQ", 15, 0, 0),
        struct.pack("<IIQ", 16, 0, 0) + b"no header at all",
        struct.pack("<IIQ", 16, 0, 0) + b'{"type":"other"}',
        struct.pack("<IIQ", 32, 0, 0) + msgspec.json.encode({"type": "ran", "id": 1}).ljust(32),
    ],
)
def test_what_is_no_frame_is_refused(content: bytes) -> None:
    with pytest.raises(WireError):
        received(content)


@pytest.mark.parametrize(
    "tensor",
    [
        np.ones(1, np.complex64),
        np.ones(1, ">f4"),
        np.array(["2014-01-01"], "datetime64[s]"),
        np.array([b"bytes"], object),
        np.array(["\ud800"], object),
    ],
    ids=str,
)
def test_a_tensor_of_another_type_is_not_sent(tensor: Tensor) -> None:
    with pytest.raises(BackendError, match="x: "):
        encoded({"x": tensor})
