"""The key that requests are routed by, and its place among all keys."""

import hashlib
from struct import Struct

from app.instances import Instances

_unpack = Struct(">QQ").unpack
_UNIT = 2.0**-53


def key_of(given: str | None, field: str | None, instances: Instances) -> str | None:
    """The routing key of a request: what it gives itself, else the `field` of its first instance.
    None where it has neither, or that is null or empty."""
    if given:
        return given
    if field is None or field not in instances.positions:
        return None
    value = instances.rows[0][instances.positions[field]]
    return None if value is None else str(value) or None


def agree(field: str | None, instances: Instances) -> bool:
    """Whether all instances have the same value there."""
    if field is None or len(instances.rows) == 1 or field not in instances.positions:
        return True
    position = instances.positions[field]
    first = instances.rows[0][position]
    return all(row[position] == first for row in instances.rows)


class Lots:
    """Draws for each key: the same in every worker of every replica, and as good as random."""

    def __init__(self, *salt: str) -> None:
        """Another salt draws anew."""
        # It costs less to copy this for each key than to begin anew.
        self._salted = hashlib.blake2b("\0".join(salt).encode(), digest_size=16)

    def draw(self, key: str) -> tuple[float, int]:
        """Its place, from 0 up to 1: who is below a share is below every larger one. And a mark of
        64 bits, which says nothing of the place."""
        lot = self._salted.copy()
        lot.update(b"\0" + key.encode("utf-8", "surrogatepass"))
        place, mark = _unpack(lot.digest())
        return (place >> 11) * _UNIT, mark
