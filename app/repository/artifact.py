"""What a training left behind, as a folder on this machine: from a path or a URL."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.repository.store import is_url


@contextmanager
def local_artifact(location: str) -> Iterator[Path]:
    """The folder at a path, or a copy of the one at a URL, which is gone afterwards.

    Raises `ConfigurationError` for a URL that cannot be used, `RepositoryUnavailable` when it
    cannot be read now, `InvalidModel` for a file that a version cannot hold.
    """
    if not is_url(location):
        yield Path(location)
        return
    # fsspec takes a while to import, and few need it.
    from app.repository.url_store import download

    with tempfile.TemporaryDirectory(prefix="hikyaku-") as folder:
        download(location, Path(folder))
        yield Path(folder)
