"""What must hold before a version answers: contract, plan, signature and golden rows agree."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from app.contract import Contract, FieldType, MissingValue, Transform
from app.deadline import Deadline
from app.errors import BackendError, DeadlineExceeded, InvalidModel
from app.features.plan import FeaturePlan, JoinKeyType
from app.outputs import OutputReader, Prediction
from app.repository.manifest import (
    Golden,
    Manifest,
    Training,
    signature_of,
)
from app.tensors import Signature, Tensors, TensorSpec, row_count, take_rows


class Executes(Protocol):
    """As much of a backend as a check needs."""

    async def execute(self, inputs: Tensors, deadline: Deadline) -> Tensors: ...


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


_MOST_GOLDEN_ROWS = 4_096
_ALONE = 12
_PAIRS = 6


def check_manifest(contract: Contract, manifest: Manifest) -> None:
    """Raises `InvalidModel` where model.yaml is not the contract of this version."""
    changes = list(_changes(manifest.inputs, contract.inputs_document()))
    if changes:
        raise InvalidModel(
            f"model.yaml: the inputs have changed since version {manifest.version} was trained: "
            f"{'; '.join(changes)}; train and publish again"
        )
    if list(manifest.feature_order) != [column.source for column in contract.columns()]:
        raise InvalidModel("the manifest's feature_order is not that of its inputs")
    signature = signature_of(manifest)
    check_inputs(contract, signature)
    OutputReader(contract.outputs, contract.decision, signature)


def check_plan(contract: Contract, plan: FeaturePlan, training: Training) -> None:
    """Raises `InvalidModel` where the stored features of the plan are not those of model.yaml."""
    check_columns(contract, plan, training)
    if contract.feature_service != (plan.feature_service or None):
        raise InvalidModel(
            f"feature_service: model.yaml says {contract.feature_service!r}, the plan is that of "
            f"{plan.feature_service!r}"
        )
    if not 0 < len(training.golden.instances) <= _MOST_GOLDEN_ROWS:
        raise InvalidModel(
            f"golden rows: {len(training.golden.instances)}, not 1 to {_MOST_GOLDEN_ROWS}"
        )


def check_signature(found: Signature, expected: Signature) -> None:
    """Raises `InvalidModel` where the file has another signature than its manifest says."""
    for kind, ours, theirs in (
        ("input", found.inputs, expected.inputs),
        ("output", found.outputs, expected.outputs),
    ):
        if ours != theirs:
            raise InvalidModel(
                f"the model's signature is not the manifest's: the file has the {kind}s "
                f"{_listed(ours)}, the manifest {_listed(theirs)}"
            )


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name!r} {spec.dtype}{list(spec.shape)}" for spec in specs) or "none"


def _changes(trained: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where two documents differ, in words."""
    if isinstance(trained, Mapping) and isinstance(now, Mapping):
        for key in [*trained, *(key for key in now if key not in trained)]:
            at = f"{where}.{key}" if where else str(key)
            if key not in now:
                yield f"{at} is gone"
            elif key not in trained:
                yield f"{at} is new"
            else:
                yield from _changes(trained[key], now[key], at)
    elif isinstance(trained, list) and isinstance(now, list) and len(trained) == len(now):
        for place, (before, after) in enumerate(zip(trained, now, strict=True)):
            yield from _changes(before, after, f"{where}[{place}]")
    elif trained != now:
        counted = isinstance(trained, list) and isinstance(now, list)
        ours, theirs = (len(trained), len(now)) if counted else (trained, now)
        yield f"{where} was {ours!r}, is {theirs!r}" + (" long" if counted else "")


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
    backend: Executes,
    outputs: OutputReader,
    rows: Tensors,
    golden: Golden,
    *,
    most_rows: int,
    what: str,
    within_s: float = 60.0,
) -> Sequence[Prediction]:
    """Execute the golden rows, so many at once at most; what was predicted. Raises `InvalidModel`
    unless that is what training said."""
    deadline, count = Deadline.after(within_s), row_count(rows)
    predictions: list[Prediction] = []
    for start in range(0, count, most_rows):
        stop = min(start + most_rows, count)
        asked = f"{what}: golden rows" + (f" {start} to {stop - 1}" if stop - start < count else "")
        batch = take_rows(rows, start, stop)
        predictions += await _predictions(backend, outputs, batch, deadline, asked)
    # Of thousands of rows with hundreds of labels it takes seconds: others are answered meanwhile.
    await asyncio.to_thread(check_golden, predictions, golden, what=what)
    return predictions


async def check_batch_invariance(
    backend: Executes,
    outputs: OutputReader,
    rows: Tensors,
    together: Sequence[Prediction],
    tolerance: float,
    deadline: Deadline,
    *,
    most_rows: int,
    what: str,
) -> None:
    """Raises `InvalidModel` unless each row is predicted as it was among the others (`together`)
    alone, beside another one in both orders, in other places, and beside itself.

    At most 27 executions of so many rows at most: of many some that lie evenly among them stand for
    all. Numbers above 1 may differ by that share of themselves: batches of other sizes are summed
    in another order.
    """
    for order in _arrangements(row_count(rows), most_rows):
        batch = {name: tensor[order] for name, tensor in rows.items()}
        asked = f"{what}: golden rows {_shortened(order)}"
        predictions = await _predictions(backend, outputs, batch, deadline, asked)
        reason = await asyncio.to_thread(
            _difference, order, predictions, together, outputs.names, tolerance
        )
        if reason is not None:
            raise InvalidModel(f"{what}: {reason}")


def _difference(
    order: Sequence[int],
    predictions: Sequence[Prediction],
    together: Sequence[Prediction],
    names: Sequence[str],
    tolerance: float,
) -> str | None:
    """Which row is predicted otherwise in this batch than before."""
    for row, given in zip(order, predictions, strict=True):
        for name in names:
            if not _close(given[name], together[row][name], tolerance, in_proportion=True):
                return (
                    f"golden row {row}: {name} is {given[name]} in a batch of the rows "
                    f"{_shortened(order)} and {together[row][name]} in one of all: what is "
                    "predicted for a row must not depend on the rows beside it"
                )
    return None


def _arrangements(count: int, most_rows: int) -> Iterator[list[int]]:
    """Batches of at most `most_rows` of the rows."""
    every = list(range(count))[:: -(-count // most_rows)]
    some = every[:: -(-len(every) // _ALONE)]
    for row in some:
        yield [row]
    for at in range(min(_PAIRS, len(some) - 1)):
        yield [some[at], some[at + 1]]
        yield [some[at + 1], some[at]]
    if len(every) > 2:
        yield every[::-1]
        yield [*every[1:], every[0]]
    yield [row for row in every for _ in range(2)][:most_rows]


def _shortened(rows: Sequence[int]) -> str:
    return str(list(rows)) if len(rows) <= 4 else f"[{rows[0]}, {rows[1]}, … {rows[-1]}]"


async def _predictions(
    backend: Executes, outputs: OutputReader, rows: Tensors, deadline: Deadline, asked: str
) -> list[Prediction]:
    """Raises `InvalidModel`, which begins with `asked`, where there are none."""
    try:
        answer = await backend.execute(rows, deadline)
        predictions = (await asyncio.to_thread(outputs.read, answer)).predictions
    except (BackendError, DeadlineExceeded) as exc:
        raise InvalidModel(f"{asked}: {exc}") from exc
    if len(predictions) != row_count(rows):
        raise InvalidModel(f"{asked}: {len(predictions)} predictions for {row_count(rows)} rows")
    return predictions


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


def _close(given: Any, expected: Any, tolerance: float, *, in_proportion: bool = False) -> bool:
    """Numbers within the tolerance (of themselves, where they are above 1 and that is meant),
    labelled numbers label by label; a null only where one is expected, NaN never."""
    if isinstance(expected, Mapping):
        return (
            isinstance(given, Mapping)
            and given.keys() == expected.keys()
            and all(
                _close(given[label], expected[label], tolerance, in_proportion=in_proportion)
                for label in expected
            )
        )
    if expected is None:
        return given is None
    if not isinstance(given, int | float) or not isinstance(expected, int | float):
        return False
    scale = max(1.0, abs(expected)) if in_proportion else 1.0
    return abs(given - expected) <= tolerance * scale
