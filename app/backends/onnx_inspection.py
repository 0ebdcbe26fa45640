"""Looks at an ONNX file before the runtime sees it."""

from pathlib import Path


def inspect_file(model: Path, files: tuple[str, ...] | None) -> None:
    """Raises `InvalidModel`."""
