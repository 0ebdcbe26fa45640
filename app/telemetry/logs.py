"""Structured logging: one JSON object a line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """Renders the event, its `extra` fields and its traceback as one line."""

    def __init__(self, worker: int | None = None) -> None:
        """`worker` is told in every line."""
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        } | self._worker
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=True)


def configure_logging(level: str, worker: int | None = None) -> None:
    """Send every logger's records to standard error as JSON lines; `worker` is the number of this
    one among several."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(worker))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # It tells of every look at its registry.
    logging.getLogger("feast").setLevel(max(logging.getLevelNamesMapping()[level], logging.WARNING))
