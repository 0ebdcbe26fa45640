"""The folders of a model repository: models with a model.yaml, numbered versions, CURRENT."""

import re
from pathlib import Path

from app.errors import InvalidModel

CONTRACT_FILE = "model.yaml"
CURRENT_FILE = "CURRENT"

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def model_folders(repository: Path) -> dict[str, Path]:
    """Every folder with a model.yaml, by name. Raises `InvalidModel` for a name that cannot be a
    part of a URL, or when the repository is no folder."""
    if not repository.is_dir():
        raise InvalidModel(f"{repository}: no such folder; MODEL_REPOSITORY names it")
    folders = {path.parent.name: path.parent for path in sorted(repository.glob("*/model.yaml"))}
    for name, folder in folders.items():
        if not _MODEL_NAME.fullmatch(name):
            raise InvalidModel(f"{folder}: a model's name has letters, digits and ._- only")
    return folders


def versions(model_dir: Path) -> list[int]:
    """The published versions, in ascending order."""
    return sorted(int(path.name) for path in model_dir.iterdir() if _VERSION.fullmatch(path.name))


def current_version(model_dir: Path) -> int | None:
    """The version that CURRENT names, None before the first one is published."""
    path = model_dir / CURRENT_FILE
    if not path.exists():
        return None
    content = path.read_text(errors="replace").strip()
    if not _VERSION.fullmatch(content):
        raise InvalidModel(f"{path}: {content[:20]!r} is no version number")
    return int(content)
