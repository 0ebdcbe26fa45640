"""What must hold before a version answers: contract, plan, signature and golden rows agree."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.backends.backend import Backend
from app.contract import Contract, FieldType, MissingValue, Transform
from app.deadline import Deadline
from app.errors import BackendError, DeadlineExceeded, InvalidModel
from app.features.plan import FeaturePlan, JoinKeyType
from app.outputs import OutputReader
from app.repository.manifest import Golden, Training
from app.tensors import Signature, Tensors, TensorSpec

_FIELD_TYPES: Mapping[str, FieldType | None] = {
    "String": "string",
    "Float32": "float",
    "Float64": "float",
    "Int32": "int",
    "Int64": "int",
    "Bool": "bool",
    "UnixTimestamp": "timestamp",
}
"""What model.yaml calls a Feast type, where it has a name for it."""

# What each transform can read; a stored text or number is a string or float here.
_READABLE: Mapping[Transform, set[FieldType]] = {
    "number": {"float", "int", "bool"},
    "category": {"string"},
    "text": {"string"},
    "minute_of_day": {"timestamp"},
    "day_of_week": {"timestamp"},
}


def check_columns(contract: Contract, plan: FeaturePlan, training: Training) -> None:
    """Raises `InvalidModel` for a column that no source can fill, or not with such values."""
    shared = plan.join_keys.keys() & contract.request_fields.keys()
    if shared:
        raise InvalidModel(f"request_fields: {', '.join(sorted(shared))} are join keys already")
    _check_request_fields(contract, plan)
    types = _source_types(contract, plan)
    for tensor in contract.inputs:
        for column in tensor.columns:
            name = column.source
            if name not in types:
                raise InvalidModel(f"inputs: {name!r} is neither a stored feature nor a field")
            if types[name] not in _READABLE[column.transform]:
                raise InvalidModel(f"inputs: {name!r} is {types[name]}, not for {column.transform}")
            if column.transform == "category" and name not in training.categories:
                raise InvalidModel(f"inputs: training gave no categories for {name!r}")
            if tensor.dtype == "int64":
                _check_integer(name, types[name], contract, plan)
    for name, policy in contract.features.missing.items():
        if name not in plan.references:
            raise InvalidModel(f"features.missing: {name!r} is not in {plan.feature_service!r}")
        _check_policy(name, policy, plan, training)


def _check_policy(name: str, policy: MissingValue, plan: FeaturePlan, training: Training) -> None:
    kind = plan.value_types[name]
    if policy.value is not None:
        given = "text" if isinstance(policy.value, str) else "number"
        if given != kind:
            of = "of another type" if kind == "other" else f"a {kind}"
            raise InvalidModel(f"features.missing: {name!r} is {of}, its `value` a {given}")
    if policy.use == "training_mean" and name not in training.means:
        raise InvalidModel(f"features.missing: training gave no mean of {name!r}")
    if policy.use == "last_good" and name in _made_on_demand(plan):
        raise InvalidModel(
            f"features.missing: {name!r} is made on demand, not read: it has no last good value"
        )


def _made_on_demand(plan: FeaturePlan) -> set[str]:
    views = (view for view in plan.views if view.transformation is not None)
    return {name for view in views for name in view.references()}


def _source_types(contract: Contract, plan: FeaturePlan) -> dict[str, FieldType | None]:
    """None for a stored value that no column can take."""
    stored: Mapping[str, FieldType | None] = {"number": "float", "text": "string", "other": None}
    keys: Mapping[JoinKeyType, FieldType | None] = {
        "string": "string",
        "int": "int",
        "bytes": None,
        "timestamp": "timestamp",
    }
    return {
        **{name: stored[kind] for name, kind in plan.value_types.items()},
        **{key: keys[kind] for key, kind in plan.join_keys.items()},
        **{name: _FIELD_TYPES.get(dtype) for name, dtype in plan.request_fields.items()},
        **contract.request_fields,
    }


def _check_request_fields(contract: Contract, plan: FeaturePlan) -> None:
    """A field that an on-demand view reads has one type, here as there."""
    for name in plan.request_fields.keys() & contract.request_fields.keys():
        dtype, declared = plan.request_fields[name], contract.request_fields[name]
        if _FIELD_TYPES.get(dtype) != declared:
            raise InvalidModel(
                f"request_fields: {name!r} is {declared}, but {plan.feature_service!r} makes "
                f"features from it as {dtype}"
            )


def _check_integer(
    name: str, kind: FieldType | None, contract: Contract, plan: FeaturePlan
) -> None:
    policy = contract.features.missing.get(name)
    replaced = policy is not None and (
        policy.use == "refuse" or (isinstance(policy.value, float) and policy.use == "constant")
    )
    if (name in plan.references or name in plan.join_keys) and not replaced:
        raise InvalidModel(
            f"inputs: {name!r} may be missing, which an int64 cannot say: use float32, or "
            "features.missing with constant or refuse"
        )
    if policy is not None and isinstance(policy.value, float) and not policy.value.is_integer():
        raise InvalidModel(f"features.missing: {name!r} has a `value` that an int64 would cut")
    if kind == "float" and name in contract.request_fields.keys() | plan.request_fields.keys():
        raise InvalidModel(f"inputs: {name!r} is a float, which an int64 would cut")


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
    backend: Backend,
    outputs: OutputReader,
    rows: Tensors,
    golden: Golden,
    *,
    what: str,
    within_s: float = 60.0,
) -> None:
    """Execute the golden rows. Raises `InvalidModel` unless they come out as training said."""
    try:
        read = outputs.read(await backend.execute(rows, Deadline.after(within_s)))
    except (BackendError, DeadlineExceeded) as exc:
        raise InvalidModel(f"{what}: golden rows: {exc}") from exc
    check_golden(read.predictions, golden, what=what)


def check_golden(predictions: Sequence[Mapping[str, Any]], golden: Golden, *, what: str) -> None:
    """Raises `InvalidModel` where a prediction is not within the tolerance of the golden one."""
    if len(predictions) != len(golden.predictions):
        raise InvalidModel(
            f"{what}: {len(golden.predictions)} golden predictions for {len(predictions)} rows"
        )
    for row, (given, expected) in enumerate(zip(predictions, golden.predictions, strict=True)):
        if given.keys() - {"decision"} != expected.keys():
            raise InvalidModel(
                f"{what}: golden row {row}: training said {sorted(expected)}, the contract's "
                f"outputs are {sorted(given.keys() - {'decision'})}"
            )
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
    return isinstance(given, int | float) and abs(given - expected) <= tolerance
