"""What a table says, as JSON."""

from typing import Any

from app.comparison.table import ComparisonTable


def comparison_document(table: ComparisonTable) -> dict[str, Any]:
    """Of one trial."""
    whole = table.groups()[0]
    return {
        "rows": whole.rows,
        "blocks": table.blocks,
        "dropped": dict(table.dropped),
        "flips": whole.flips,
        "failed": whole.failed,
    }
