"""Spoils a published version as disks, copies and hands do."""

import random
from pathlib import Path


def corrupt(version: Path, rng: random.Random) -> str:
    """Change one file of the version, and say how. The same seed does the same."""
    path = rng.choice(sorted(version.iterdir()))
    content = path.read_bytes()
    place = rng.randrange(len(content))
    match rng.choice(("flip", "truncate", "empty", "extend", "zeros", "remove")):
        case "flip":
            bit = 1 << rng.randrange(8)
            spoilt = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
            how = f"bit {bit} of byte {place} flipped"
        case "truncate":
            spoilt, how = content[:place], f"cut at byte {place}"
        case "empty":
            spoilt, how = b"", "empty"
        case "extend":
            spoilt, how = content + rng.randbytes(1 + place % 100), "longer"
        case "zeros":
            # At least one byte that was not zero is.
            spoilt = content[: content.rindex(content.strip(b"\0")[-1])]
            spoilt, how = spoilt.ljust(len(content), b"\0"), f"zeros from byte {len(spoilt)}"
        case _:
            path.unlink()
            return f"{path.name}: removed"
    path.write_bytes(spoilt)
    return f"{path.name}: {how}"
