"""Whatever happens to a few requests in whatever order: each ends once, as it should.

`make prove-batcher` tries the orders of three requests without leaving any out.
"""

import logging
from collections.abc import Iterator

import pytest

from tests.batching.interleavings import Setting, try_all

TWO = (1, 1)
ALL_ENDS = ("completes", "fails", "dies")


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """Thousands of executions fail, and each would be logged."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


# The numbers are what there is to try: fewer means that the enumeration shrank.
@pytest.mark.parametrize(
    ("setting", "orders"),
    [
        pytest.param(Setting(rows=TWO, batch_rows=2), 124, id="in one batch"),
        pytest.param(Setting(rows=TWO, batch_rows=1), 124, id="one row a batch"),
        pytest.param(Setting(rows=(2, 1), batch_rows=1), 302, id="larger than a batch"),
        pytest.param(Setting(rows=TWO, ends=ALL_ENDS), 1065, id="the backend dies"),
        pytest.param(Setting(rows=TWO, step_s=10.0), 208, id="given up"),
        pytest.param(Setting(rows=TWO, step_s=10.0, occupied=True), 679, id="given up in parts"),
        pytest.param(Setting(rows=TWO, asks=("asks", "asks_late")), 193, id="late already"),
    ],
)
def test_two_requests_in_every_order(setting: Setting, orders: int) -> None:
    assert try_all(setting) >= orders


@pytest.mark.parametrize(
    ("setting", "orders"),
    [
        pytest.param(Setting(), 240, id="in one batch"),
        pytest.param(Setting(batch_rows=2), 240, id="two in a batch"),
        pytest.param(Setting(concurrency=2), 745, id="two executions at a time"),
        pytest.param(Setting(concurrency=2, batch_rows=1), 745, id="each by itself"),
        pytest.param(Setting(occupied=True), 412, id="waiting together"),
        pytest.param(Setting(rows=TWO, batch_rows=2, hurries=1), 1280, id="between turns"),
        pytest.param(Setting(rows=TWO, batch_rows=1, hurries=1), 1260, id="one, between turns"),
        pytest.param(
            Setting(rows=TWO, occupied=True, hurries=1), 2002, id="waiting together, between turns"
        ),
    ],
)
def test_more_requests_in_some_orders(setting: Setting, orders: int) -> None:
    assert try_all(setting, share=0.01) >= orders
