"""Ways in which the files of a published version can be damaged or forged, at random."""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.repository.manifest import MANIFEST_FILE, with_checksum


@dataclass(frozen=True)
class Damage:
    """What became of a version's files: their new content, None where one is gone. Whoever refuses
    it names one of `blamed`."""

    what: str
    files: Mapping[str, bytes | None]
    blamed: frozenset[str]

    def apply(self, version_dir: Path) -> None:
        """Do it to a version in a folder."""
        for name, content in self.files.items():
            if content is None:
                (version_dir / name).unlink()
            else:
                (version_dir / name).write_bytes(content)


def damages(intact: Mapping[str, bytes], seed: int) -> Iterator[Damage]:
    """Endless ones of a version with these files, each of which whoever takes the version must
    refuse."""
    choose = random.Random(seed)
    while True:
        if choose.random() < 0.15:
            yield _forged_files(intact, choose)
        elif choose.random() < 0.1:
            yield _exchanged(intact, choose)
        else:
            yield _harmed(intact, choose)


def forgeries(intact: Mapping[str, bytes], seed: int) -> Iterator[Damage]:
    """Endless manifests that are whole and fit the files, but are not the one that was published:
    only its digest or a signature tells."""
    choose = random.Random(seed)
    while True:
        document = _document(intact)
        forge = choose.choice(_OTHER_FORGERIES)
        forge(document, choose)
        yield _manifest(f"forged: {forge.__name__[1:]}", document, MANIFEST_FILE)


def _harmed(intact: Mapping[str, bytes], choose: random.Random) -> Damage:
    name = choose.choice(sorted(intact))
    harm = choose.choice(_HARMS)
    content = harm(intact[name], choose)
    if content == intact[name]:
        content = intact[name] + b"\0"
    return Damage(f"{name}: {harm.__name__[1:]}", {name: content}, frozenset({name}))


def _exchanged(intact: Mapping[str, bytes], choose: random.Random) -> Damage:
    first, second = choose.sample(sorted(intact), 2)
    files = {first: intact[second], second: intact[first]}
    return Damage(f"{first} and {second} exchanged", files, frozenset(files))


def _forged_files(intact: Mapping[str, bytes], choose: random.Random) -> Damage:
    document = _document(intact)
    name = choose.choice(sorted(document["files"]))
    forge = choose.choice(_FILE_FORGERIES)
    blamed = forge(document, name, choose)
    return _manifest(f"forged: {forge.__name__[1:]}", document, blamed)


def _document(intact: Mapping[str, bytes]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(intact[MANIFEST_FILE])
    del document["checksum"]
    return document


def _manifest(what: str, document: Mapping[str, Any], blamed: str) -> Damage:
    content = with_checksum(json.dumps(document, indent=1).encode() + b"\n")
    return Damage(what, {MANIFEST_FILE: content}, frozenset({blamed}))


def _bits_flipped(content: bytes, choose: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(choose.choice((1, 1, 1, 2, 8))):
        changed[choose.randrange(len(changed))] ^= 1 << choose.randrange(8)
    return bytes(changed)


def _truncated(content: bytes, choose: random.Random) -> bytes:
    return content[: choose.randrange(len(content))]


def _extended(content: bytes, choose: random.Random) -> bytes:
    return content + choose.randbytes(choose.choice((1, 1, 100, 10_000)))


def _zeroed(content: bytes, choose: random.Random) -> bytes:
    start = choose.randrange(len(content))
    end = min(len(content), start + choose.choice((1, 16, 512)))
    return content[:start] + bytes(end - start) + content[end:]


def _shifted(content: bytes, choose: random.Random) -> bytes:
    start = choose.randrange(len(content))
    return content[:start] + content[start + 1 :] + content[start : start + 1]


def _doubled(content: bytes, choose: random.Random) -> bytes:
    return content + content


def _replaced(content: bytes, choose: random.Random) -> bytes:
    return choose.randbytes(len(content))


def _emptied(content: bytes, choose: random.Random) -> bytes:
    return b""


def _removed(content: bytes, choose: random.Random) -> bytes | None:
    return None


_HARMS: tuple[Callable[[bytes, random.Random], bytes | None], ...] = (
    *(_bits_flipped, _bits_flipped, _bits_flipped, _truncated, _truncated, _extended),
    *(_zeroed, _shifted, _doubled, _replaced, _emptied, _removed),
)


def _another_digest(document: dict[str, Any], name: str, choose: random.Random) -> str:
    document["files"][name]["sha256"] = choose.randbytes(32).hex()
    return name


def _another_size(document: dict[str, Any], name: str, choose: random.Random) -> str:
    size = document["files"][name]["bytes"]
    document["files"][name]["bytes"] = choose.choice((0, size - 1, size + 1, size * 1_000))
    return name


def _an_impossible_size(document: dict[str, Any], name: str, choose: random.Random) -> str:
    document["files"][name]["bytes"] = choose.choice((-1, 1 << 62, 1e300, "x", None, 0.5))
    return MANIFEST_FILE


def _no_digest(document: dict[str, Any], name: str, choose: random.Random) -> str:
    wrong = ("", "0" * 63, "G" * 64, None, 1, "0" * 64 + "\n")
    document["files"][name]["sha256"] = choose.choice(wrong)
    return MANIFEST_FILE


def _a_file_elsewhere(document: dict[str, Any], name: str, choose: random.Random) -> str:
    wrong = (
        *("../model.onnx", "/etc/passwd", "a/../../b", "", ".", "..", "a//b", "/", "a\0b", "a/"),
        *(".hidden", "\u202e", "a" * 300, "/".join("abcdefghijk"), "manifest.json", "manifest.sig"),
        *("~/x", "C:\\x", "model.onnx/below", "model.onnx\n"),
    )
    document["files"][choose.choice(wrong)] = document["files"][name]
    return MANIFEST_FILE


def _a_file_that_is_not_there(document: dict[str, Any], name: str, choose: random.Random) -> str:
    other = f"weights-{choose.randrange(1000)}"
    document["files"][other] = document["files"][name]
    return other


def _too_many_files(document: dict[str, Any], name: str, choose: random.Random) -> str:
    document["files"] |= {f"f{number}": document["files"][name] for number in range(5_000)}
    return MANIFEST_FILE


def _a_file_less(document: dict[str, Any], name: str, choose: random.Random) -> str:
    del document["files"][choose.choice(("model.onnx", "plan.json"))]
    return MANIFEST_FILE


def _another_version(document: dict[str, Any], name: str, choose: random.Random) -> str:
    document["version"] = choose.choice((0, -1, 2, 10**9, "1.5", None, True, [1]))
    if document["version"] is True:
        document["version"] = 99
    return MANIFEST_FILE


def _another_model(document: dict[str, Any], name: str, choose: random.Random) -> str:
    document["model"] = choose.choice(("giant", "", "../tiny", None, 1, "tiny\0"))
    return MANIFEST_FILE


def _a_key_less(document: dict[str, Any], name: str, choose: random.Random) -> str:
    del document[choose.choice(sorted(document))]
    return MANIFEST_FILE


def _an_unknown_key(document: dict[str, Any], name: str, choose: random.Random) -> str:
    document[choose.randbytes(4).hex()] = choose.choice((1, None, {}, "x" * 1_000))
    return MANIFEST_FILE


def _nothing_for_something(document: dict[str, Any], name: str, choose: random.Random) -> str:
    document[choose.choice(("files", "signature", "training", "inputs"))] = None
    return MANIFEST_FILE


_FILE_FORGERIES = (
    *(_another_digest, _another_size, _an_impossible_size, _no_digest, _a_file_elsewhere),
    *(_a_file_that_is_not_there, _too_many_files, _a_file_less, _another_version),
    *(_another_model, _a_key_less, _an_unknown_key, _nothing_for_something),
)


def _better_metrics(document: dict[str, Any], choose: random.Random) -> None:
    document["training"]["metrics"]["auc"] = 1 - choose.random() / 1_000_000


def _another_author(document: dict[str, Any], choose: random.Random) -> None:
    document["source_commit"] = choose.randbytes(20).hex()


def _another_instant(document: dict[str, Any], choose: random.Random) -> None:
    document["published_at"] = f"20{choose.randrange(30, 99)}-01-01T00:00:00+00:00"


def _other_golden_rows(document: dict[str, Any], choose: random.Random) -> None:
    document["training"]["golden"]["tolerance"] = choose.uniform(1e-6, 1e-4)


_OTHER_FORGERIES: tuple[Callable[[dict[str, Any], random.Random], None], ...] = (
    *(_better_metrics, _another_author, _another_instant, _other_golden_rows),
)
