"""What was counted of the candidates, over HTTP."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api.comparison import add_comparison
from app.errors import ModelNotReady, NotFound
from app.release.state import StateUnavailable


class Counted:
    """Two candidates of one model."""

    async def document(self, model: str) -> dict[str, Any]:
        candidates = [{"version": version, "comparison": {}} for version in ("2", "7")]
        return {"model": model, "candidates": candidates, "quality": None}


class OutOfReach:
    """A state that does not answer."""

    async def document(self, model: str) -> dict[str, Any]:
        raise StateUnavailable("connection to 10.0.0.7 refused")


def client(comparisons: Any) -> httpx.AsyncClient:
    app = FastAPI()
    add_comparison(app, {"flights"}, lambda: comparisons)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


async def test_the_comparison_holds_every_candidate_or_the_one_that_is_asked_for() -> None:
    async with client(Counted()) as http:
        every = (await http.get("/v1/models/flights/comparison")).json()
        one = (await http.get("/v1/models/flights/comparison?candidate=7")).json()
    assert [each["version"] for each in every["candidates"]] == ["2", "7"]
    assert one == {**every, "candidates": [{"version": "7", "comparison": {}}]}


@pytest.mark.parametrize(
    "path", ["/v1/models/other/comparison", "/v1/models/flights/comparison?candidate=3"]
)
async def test_a_model_or_candidate_that_is_not_there_is_not_found(path: str) -> None:
    async with client(Counted()) as http:
        with pytest.raises(NotFound):
            await http.get(path)


async def test_a_state_out_of_reach_is_told_without_saying_where_it_is() -> None:
    async with client(OutOfReach()) as http:
        with pytest.raises(ModelNotReady, match="cannot be read now") as raised:
            await http.get("/v1/models/flights/comparison")
    assert "10.0.0.7" not in str(raised.value)
