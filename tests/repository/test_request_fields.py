"""Fields of an instance that on-demand views read, against what model.yaml says of them."""

from dataclasses import replace

import pytest

from app.contract import Contract
from app.errors import InvalidModel
from app.features.plan import PlannedFeature, PlannedView, Transformation
from app.repository.checks import check_columns
from app.repository.manifest import Training
from tests.tiny_models import DRIVERS, contract, training

MADE = PlannedView(
    "made",
    (),
    None,
    (PlannedFeature("score", "Float64"),),
    transformation=Transformation("python", (), ("distance", "hour"), "", ""),
)
TRAINING = Training.model_validate(training("stored"))
CONTRACT = Contract.model_validate(contract("stored"))


def test_a_field_that_model_yaml_declares_has_the_type_of_the_registry() -> None:
    fitting = {"distance": "Float64", "hour": "Int64"}
    plan = replace(DRIVERS, views=(*DRIVERS.views, MADE), request_fields=fitting)
    check_columns(CONTRACT, plan, TRAINING)
    other = replace(plan, request_fields=fitting | {"distance": "String"})
    with pytest.raises(InvalidModel, match="'distance' is float, but 'drivers' makes features"):
        check_columns(CONTRACT, other, TRAINING)


def test_a_column_may_read_a_field_that_only_on_demand_views_declare() -> None:
    plan = replace(
        DRIVERS,
        views=(*DRIVERS.views, MADE),
        request_fields={"distance": "Float64", "hour": "Int64", "token": "Bytes"},
    )
    for column in ("hour", "made:score"):
        inputs = [{"tensor": "x", "columns": [column]}]
        check_columns(Contract.model_validate(contract("stored", inputs=inputs)), plan, TRAINING)
    inputs = [{"tensor": "x", "columns": ["token"]}]
    with pytest.raises(InvalidModel, match="'token' is None, not for number"):
        check_columns(Contract.model_validate(contract("stored", inputs=inputs)), plan, TRAINING)
