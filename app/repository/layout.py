"""What is where in a model repository: models with a model.yaml, numbered versions, CURRENT."""

import re

from app.errors import InvalidModel

CONTRACT_FILE = "model.yaml"
CURRENT_FILE = "CURRENT"
TRITON_FILE = "config.pbtxt"

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_PART_OF_A_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,127}")
_MOST_PARTS = 8


def is_model_name(name: str) -> bool:
    """Whether it can be the name of a model, which becomes a part of paths and URLs."""
    return _MODEL_NAME.fullmatch(name) is not None


def is_version(name: str) -> bool:
    """Whether it is how a version's number is written: no sign, no leading zero."""
    return _VERSION.fullmatch(name) is not None


def is_file_name(name: str) -> bool:
    """Whether a version may hold a file of this name: relative, its parts divided by `/`, none of
    them hidden and none that leads out of the folder."""
    parts = name.split("/")
    return len(parts) <= _MOST_PARTS and all(map(_PART_OF_A_FILE_NAME.fullmatch, parts))


def require_model_name(name: str) -> None:
    """Raises `InvalidModel` for what cannot be the name of a model."""
    if not is_model_name(name):
        raise InvalidModel(f"{name[:80]!r}: a model's name has letters, digits and ._- only")


def require_version(version: int) -> None:
    """Raises `InvalidModel` for a number that no version can have."""
    if not is_version(str(version)):
        raise InvalidModel(f"{str(version)[:20]}: versions are numbered from 1 to 999999999")


def version_in(content: bytes, what: str) -> int:
    """The version that the content of a CURRENT names. Raises `InvalidModel` naming `what`."""
    name = content.decode(errors="replace").strip()
    if not is_version(name):
        raise InvalidModel(f"{what}: {name[:20]!r} is no version number")
    return int(name)
