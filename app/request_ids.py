"""The id of a request: random, and it says which worker gave it, and in which of its buckets."""

import os
import re
import secrets
from collections.abc import Iterator
from typing import NamedTuple

_AT_ONCE = 256
_TAG_BYTES = 4
_BUCKET_HEX = 6
_RANDOM_BYTES = 9
_MOST_BUCKETS = 1 << 4 * _BUCKET_HEX
_LENGTH = 2 * (_TAG_BYTES + _RANDOM_BYTES) + _BUCKET_HEX
_FIRST_RANDOM = _LENGTH - 2 * _RANDOM_BYTES
_FORM = re.compile(rf"[0-9a-f]{{{_LENGTH}}}")
_DRAWN_HEX = 8
_ALL = "g"
"""Greater than every hexadecimal number."""

IDS_IN_BUCKET = 64
"""Of sampled requests: so many predictions are kept, and looked up, together."""


class RequestId(NamedTuple):
    """What an id says: the tag of who gave it, the number of its bucket, and what is random."""

    tag: bytes
    bucket: int
    random: bytes

    @classmethod
    def parse(cls, text: str) -> "RequestId | None":
        """None for what is no such id."""
        if _FORM.fullmatch(text) is None:
            return None
        content = bytes.fromhex(text)
        number = int.from_bytes(content[_TAG_BYTES:-_RANDOM_BYTES])
        return cls(content[:_TAG_BYTES], number, content[-_RANDOM_BYTES:])


def drawn(request_id: str) -> float:
    """A number from 0 up to 1 that belongs to the request: whoever samples by it sees the same
    requests, the smaller share a part of the larger one."""
    return int(request_id[_FIRST_RANDOM : _FIRST_RANDOM + _DRAWN_HEX], 16) / float(16**_DRAWN_HEX)


class RequestIds:
    """Gives the ids of one model's requests in one worker: 32 hexadecimal characters, of which 8
    are the tag (drawn at the start), 6 the number of the bucket and 18 random.

    A bucket is 64 requests of the sample one after the other, in which is a `share` of all. Whether
    a request is in the sample is a function of the random part alone.
    """

    def __init__(self, share: float = 1.0) -> None:
        self._in_bucket = max(round(IDS_IN_BUCKET / share), 1)
        self._below = _ALL if share >= 1 else f"{int(share * 16**_DRAWN_HEX):0{_DRAWN_HEX}x}"
        self._left = 0
        """Ids that the bucket still gives."""
        self._tags: tuple[str, ...] = ()
        """This one and the one before, as ids begin with them."""
        self._start()
        self.next = self._drawn().__next__
        """The next id. It costs a fifth of a microsecond."""

    def turn(self) -> None:
        """The next id is of another bucket."""
        self._left = 0

    def is_sampled(self, request_id: str) -> bool:
        """Whether a prediction with this id, of whatever worker, is in the sample."""
        return request_id[_FIRST_RANDOM : _FIRST_RANDOM + _DRAWN_HEX] < self._below

    def gave(self, request_id: str) -> bool:
        """Whether it is one of these ids; of those before the last two tags that is forgotten."""
        return request_id[: 2 * _TAG_BYTES] in self._tags

    def _start(self) -> None:
        self.tag = secrets.token_bytes(_TAG_BYTES)
        self._tags = (*self._tags[-1:], self.tag.hex())
        self.bucket = -1
        """The number that ids get now; -1 before the first one."""

    def _drawn(self) -> Iterator[str]:
        """The kernel is asked for many at a time: a call costs it three times what an id costs."""
        width = 2 * _RANDOM_BYTES
        while True:
            drawn = os.urandom(_RANDOM_BYTES * _AT_ONCE).hex()
            for start in range(0, width * _AT_ONCE, width):
                if not self._left:
                    prefix = self._next_bucket()
                self._left -= 1
                yield prefix + drawn[start : start + width]

    def _next_bucket(self) -> str:
        if self.bucket + 1 == _MOST_BUCKETS:  # no tag is used for longer than its numbers last
            self._start()
        self.bucket += 1
        self._left = self._in_bucket
        return f"{self.tag.hex()}{self.bucket:0{_BUCKET_HEX}x}"
