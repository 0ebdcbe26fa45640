"""Private copies of published versions, by the digest of their manifest: the only ones loaded."""

from dataclasses import dataclass
from pathlib import Path

from app.repository.manifest import Manifest


@dataclass(frozen=True, slots=True)
class VaultedVersion:
    """A version in the vault: every file is the one that its manifest lists."""

    folder: Path
    manifest: Manifest
    sha256: str
    """Of the manifest."""
