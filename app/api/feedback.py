"""The operation that takes the truth about predictions."""

from collections import Counter
from collections.abc import Callable, Container, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response

from app.errors import Conflict, InvalidInput, NotFound, PayloadTooLarge
from app.instances import malformed, misfit
from app.labels.feedback import InstanceNumber, Outcome, Told
from app.labels.keeper import Labels

MOST_LABELS = 10_000
"""In one body."""
_STATUS = {outcome: outcome.name.lower() for outcome in Outcome}
_RESULTS = {
    outcome: msgspec.Raw(
        msgspec.json.encode(
            {"status": _STATUS[outcome]}
            if outcome is Outcome.ACCEPTED
            else {"status": _STATUS[outcome], "message": outcome.value}
        )
    )
    for outcome in Outcome
}
_EXAMPLE = {"request_id": "0" * 32, "instance": 0, "label": True}


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    """Some labels, or the members of one."""

    labels: list[Told] | msgspec.UnsetType = msgspec.UNSET
    request_id: str | msgspec.UnsetType = msgspec.UNSET
    label: bool | int | float | str | msgspec.UnsetType | None = msgspec.UNSET
    instance: InstanceNumber = 0

    @property
    def alone(self) -> Told | None:
        """None of some. Raises `InvalidInput` for neither, and for both."""
        if self.labels is not msgspec.UNSET:
            if self.request_id is not msgspec.UNSET or self.label is not msgspec.UNSET:
                raise InvalidInput("labels: either these, or one label alone", field="labels")
            return None
        for field in ("request_id", "label"):
            if getattr(self, field) is msgspec.UNSET:
                raise InvalidInput(f"{field}: missing", field=field)
        assert isinstance(self.request_id, str)
        assert not isinstance(self.label, msgspec.UnsetType)
        return Told(self.request_id, self.label, self.instance)


_decoder = msgspec.json.Decoder(_Body)


def add_feedback(app: FastAPI, models: Container[str], labels: Callable[[], Labels]) -> None:
    """Add the operation, which needs an operator (app/api/admit.py); `labels` are there once the
    service has started."""

    @app.post(
        "/v1/models/{name}:feedback",
        tags=["labels"],
        # The body is decoded here: ten thousand labels take pydantic 20 ms.
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"example": {"labels": [_EXAMPLE]}}},
            }
        },
    )
    async def feedback(name: str, request: Request) -> Response:
        """Tell the truth about predictions: up to 10,000 `labels`, each with the `request_id` and
        the `instance` (0 by default) that it is about; a `label` of null says that there will never
        be one. Answers what became of each; the first one counts. One label may come without
        `labels` around it: then 404 and 409 say that it does not count."""
        if name not in models:
            raise NotFound(f"no model is named {name[:64]!r}")
        body = _decoded(await request.body())
        alone = body.alone
        if alone is not None:
            [outcome] = await labels().tell(name, [alone])
            return _json(_one(outcome))
        assert not isinstance(body.labels, msgspec.UnsetType)
        if len(body.labels) > MOST_LABELS:
            raise PayloadTooLarge(f"labels: {len(body.labels):,}, at most {MOST_LABELS:,}")
        return _json(_several(await labels().tell(name, body.labels)))


def _decoded(body: bytes) -> _Body:
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise misfit(str(exc)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise malformed(str(exc), body) from None


def _one(outcome: Outcome) -> dict[str, Any]:
    """Raises `NotFound` and `Conflict` for a label that does not count."""
    if outcome is Outcome.CONFLICT:
        raise Conflict(f"{_STATUS[outcome]}: {outcome.value}")
    if outcome not in {Outcome.ACCEPTED, Outcome.DUPLICATE}:
        raise NotFound(f"{_STATUS[outcome]}: {outcome.value}")
    return {"status": _STATUS[outcome], "message": outcome.value}


def _several(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    counts = Counter(outcomes)
    return {
        **{status: counts[outcome] for outcome, status in _STATUS.items()},
        "results": [_RESULTS[outcome] for outcome in outcomes],
    }


def _json(document: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
