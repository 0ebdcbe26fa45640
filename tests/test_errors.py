import re
from pathlib import Path

import pytest

from app.api.answers import STATUS_OF
from app.errors import RequestError

README = (Path(__file__).parent.parent / "README.md").read_text()

CLOSED_LIST = {
    "invalid_input": (400, False),
    "unauthorized": (401, False),
    "forbidden": (403, False),
    "not_found": (404, False),
    "conflict": (409, False),
    "payload_too_large": (413, False),
    "rate_limited": (429, True),
    "overloaded": (503, True),
    "features_unavailable": (503, True),
    "model_not_ready": (503, True),
    "shutting_down": (503, True),
    "deadline_exceeded": (504, True),
    "backend_error": (500, False),
    "internal": (500, False),
}


def test_the_codes_are_the_closed_list() -> None:
    assert {kind.code for kind in RequestError.__subclasses__()} == set(CLOSED_LIST)


@pytest.mark.parametrize("kind", RequestError.__subclasses__(), ids=lambda kind: kind.code)
def test_a_code_has_its_status_and_says_whether_a_retry_can_help(kind: type[RequestError]) -> None:
    assert (STATUS_OF[kind.code], kind.retryable) == CLOSED_LIST[kind.code]


def test_the_readme_lists_every_code() -> None:
    listed = re.findall(r"^\| `([a-z_]+)` \| (\d{3}) \| (yes|no) \|$", README, re.MULTILINE)
    assert {code: (int(s), retry == "yes") for code, s, retry in listed} == CLOSED_LIST
