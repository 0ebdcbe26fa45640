"""What must hold before a version answers: contract, plan, signature and golden rows agree."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.backends.backend import Backend
from app.contract import Contract
from app.errors import BackendError, InvalidModel
from app.features.plan import FeaturePlan
from app.outputs import OutputReader
from app.repository.manifest import Golden, Training
from app.tensors import Signature, Tensors, TensorSpec


def check_columns(contract: Contract, plan: FeaturePlan, training: Training) -> None:
    """Raises `InvalidModel` for a column that no source can fill."""
    known = {*plan.references, *plan.join_keys, *contract.request_fields}
    for column in contract.columns():
        if column.source not in known:
            raise InvalidModel(f"inputs: {column.source!r} is neither a stored feature nor a field")
        if column.transform in {"category", "text"} and not _is_text(column.source, contract, plan):
            raise InvalidModel(f"inputs: {column.source!r} is no text, as {column.transform} needs")
        if column.transform == "category" and column.source not in training.categories:
            raise InvalidModel(f"inputs: training gave no categories for {column.source!r}")
    for tensor in contract.inputs:
        for column in tensor.columns:
            if tensor.dtype == "int64" and _may_be_null(column.source, contract, plan):
                raise InvalidModel(
                    f"inputs.{tensor.tensor}: {column.source!r} may be missing, which an int64 "
                    "cannot say: use float32, or features.missing with constant or refuse"
                )
    for name in contract.features.missing:
        if name not in plan.references:
            raise InvalidModel(f"features.missing: {name!r} is not in {plan.feature_service!r}")


def _is_text(source: str, contract: Contract, plan: FeaturePlan) -> bool:
    return "string" in (plan.join_keys.get(source), contract.request_fields.get(source)) or (
        plan.value_types.get(source) == "text"
    )


def _may_be_null(source: str, contract: Contract, plan: FeaturePlan) -> bool:
    policy = contract.features.missing.get(source)
    if policy is not None and policy.use != "null":
        return False
    return source in plan.references or source in plan.join_keys


def declared_inputs(contract: Contract) -> tuple[TensorSpec, ...]:
    """The input tensors as model.yaml declares them."""
    return tuple(
        TensorSpec(spec.tensor, spec.dtype, (len(spec.columns),)) for spec in contract.inputs
    )


def check_inputs(contract: Contract, signature: Signature) -> None:
    """Raises `InvalidModel` where the declared inputs are not the ones that the model takes."""
    declared = {spec.name: spec for spec in declared_inputs(contract)}
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


async def run_golden(
    backend: Backend, outputs: OutputReader, rows: Tensors, golden: Golden, *, what: str
) -> None:
    """Execute the golden rows. Raises `InvalidModel` unless they come out as training said."""
    try:
        predictions, _ = outputs.read(await backend.execute(rows))
    except BackendError as exc:
        raise InvalidModel(f"{what}: golden rows: {exc}") from exc
    check_golden(predictions, golden, what=what)


def check_golden(predictions: Sequence[Mapping[str, Any]], golden: Golden, *, what: str) -> None:
    """Raises `InvalidModel` where a prediction is not within the tolerance of the golden one."""
    if len(predictions) != len(golden.predictions):
        raise InvalidModel(
            f"{what}: {len(golden.predictions)} golden predictions for {len(predictions)} rows"
        )
    for row, (given, expected) in enumerate(zip(predictions, golden.predictions, strict=True)):
        for name, value in expected.items():
            if not _close(given.get(name), value, golden.tolerance):
                raise InvalidModel(
                    f"{what}: golden row {row}: {name} is {given.get(name)}, training said {value}"
                )


def _close(given: Any, expected: Any, tolerance: float) -> bool:
    """Numbers within the tolerance, labelled numbers label by label; NaN is close to nothing."""
    if isinstance(expected, Mapping):
        return (
            isinstance(given, Mapping)
            and given.keys() == expected.keys()
            and all(_close(given[label], expected[label], tolerance) for label in expected)
        )
    return isinstance(given, float) and abs(given - expected) <= tolerance
