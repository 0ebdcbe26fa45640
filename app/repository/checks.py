"""What must hold before a version answers: contract, plan, signature and golden rows agree."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.contract import Contract
from app.errors import InvalidModel
from app.features.plan import FeaturePlan
from app.repository.manifest import Golden, Training
from app.tensors import Signature, TensorSpec


def check_columns(contract: Contract, plan: FeaturePlan, training: Training) -> None:
    """Raises `InvalidModel` for a column that no source can fill."""
    known = {*plan.references, *plan.join_keys, *contract.request_fields}
    for column in contract.columns():
        if column.source not in known:
            raise InvalidModel(f"inputs: {column.source!r} is neither a stored feature nor a field")
        if column.transform == "category" and column.source not in training.categories:
            raise InvalidModel(f"inputs: training gave no categories for {column.source!r}")
    for name in contract.features.missing:
        if name not in plan.references:
            raise InvalidModel(f"features.missing: {name!r} is not in {plan.feature_service!r}")


def check_inputs(contract: Contract, signature: Signature) -> None:
    """Raises `InvalidModel` where the declared inputs are not the ones that the model takes."""
    declared = {
        spec.tensor: TensorSpec(spec.tensor, spec.dtype, (len(spec.columns),))
        for spec in contract.inputs
    }
    for spec in signature.inputs:
        given = declared.pop(spec.name, None)
        if given is None:
            raise InvalidModel(f"inputs: nothing is declared for the model's input {spec.name!r}")
        fits = given.shape == spec.shape or spec.shape == (-1,)
        if not fits or given.dtype != spec.dtype:
            raise InvalidModel(
                f"inputs.{spec.name}: declared {given.dtype}{list(given.shape)} a row, "
                f"the model takes {spec.dtype}{list(spec.shape)}"
            )
    if declared:
        raise InvalidModel(f"inputs: the model has no input {', '.join(map(repr, declared))}")


def check_golden(predictions: Sequence[Mapping[str, Any]], golden: Golden, *, what: str) -> None:
    """Raises `InvalidModel` where a prediction is not within the tolerance of the golden one."""
    for row, (given, expected) in enumerate(zip(predictions, golden.predictions, strict=True)):
        for name, value in expected.items():
            numbers = (
                zip(_numbers(given[name]), _numbers(value), strict=True)
                if name in given
                else [(np.nan, 0.0)]
            )
            for got, wanted in numbers:
                if not abs(got - wanted) <= golden.tolerance:  # NaN fails too
                    raise InvalidModel(
                        f"{what}: golden row {row}: {name} is {given.get(name)}, "
                        f"training said {value}"
                    )


def _numbers(value: Any) -> list[float]:
    return list(value.values()) if isinstance(value, dict) else [value]
