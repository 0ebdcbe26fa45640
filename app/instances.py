"""The instances of a request: typed decoding of JSON into columns, one type per model."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, TypeAlias

import msgspec

from app.contract import Contract, FieldType
from app.errors import InvalidInput, PayloadTooLarge
from app.features.plan import FeaturePlan, JoinKeyType

_FIELD_TYPES: Mapping[FieldType, Any] = {
    "string": Annotated[str, msgspec.Meta(max_length=256)],
    "float": float,
    "int": Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)],
    "bool": bool,
    "timestamp": Annotated[datetime, msgspec.Meta(tz=True)],
}
_INT64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_BYTES = Annotated[bytes, msgspec.Meta(max_length=256)]  # base64 in JSON
_KEY_TYPES: Mapping[JoinKeyType, Any] = {
    "string": _FIELD_TYPES["string"] | None,
    "int": _INT64 | None,
    "bytes": _BYTES | None,
    "timestamp": _FIELD_TYPES["timestamp"] | None,
}
_FEAST_TYPES: Mapping[str, Any] = {
    "String": _FIELD_TYPES["string"],
    "Float32": float,
    "Float64": float,
    "Int32": Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)],
    "Int64": _INT64,
    "Bool": bool,
    "Bytes": _BYTES,
    "UnixTimestamp": _FIELD_TYPES["timestamp"],
}
"""Of the fields that on-demand views read, where model.yaml does not declare them."""

_SHOWN = 128
_STORED_TYPES: Mapping[str, Any] = {
    "number": float | bool | None | msgspec.UnsetType,
    "text": str | None | msgspec.UnsetType,
}


Row: TypeAlias = tuple[Any, ...]
"""The values of one instance, in the order of `InstanceDecoder.required`."""

_NONE: Mapping[str, Sequence[Any]] = {}
_as_tuple = msgspec.structs.astuple


@dataclass(slots=True)  # made for every request; a frozen one takes 1 µs longer to make
class Instances:
    """The instances of one request.

    `rows`: the values of each. `positions`: where each join key and request field is in a row.
    `overrides`: for each stored feature that some instance gives itself, its value in every row,
    `UNSET` where it is not given.
    """

    rows: Sequence[Row]
    positions: Mapping[str, int]
    overrides: Mapping[str, Sequence[Any]]
    verbose: bool

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def fields(self) -> Mapping[str, Sequence[Any]]:
        """For each join key and request field, its value in every row."""
        return _Columns(self.positions, self.rows)


class _Columns(Mapping[str, Sequence[Any]]):
    """Rows seen as columns, of which one is made when it is asked for."""

    __slots__ = ("_positions", "_rows")

    def __init__(self, positions: Mapping[str, int], rows: Sequence[Row]) -> None:
        self._positions = positions
        self._rows = rows

    def __getitem__(self, name: str) -> Sequence[Any]:
        position = self._positions[name]
        return [row[position] for row in self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


def together(parts: Sequence[Instances]) -> Instances:
    """The instances of several requests to one model, none of which gives a stored feature itself
    unless it is the only one."""
    if len(parts) == 1:
        return parts[0]
    rows = [row for part in parts for row in part.rows]
    return Instances(rows, parts[0].positions, _NONE, verbose=False)


class InstanceDecoder:
    """Decodes `{"instances": [{…}, …], "verbose": false}` for one model.

    An instance holds every join key of the plan (null: the row has no such entity), every request
    field of the contract and of the plan, and may give a feature itself, as `view:feature`: but
    none from which others are made, because those would not follow.
    """

    def __init__(self, contract: Contract, plan: FeaturePlan) -> None:
        required: dict[str, Any] = {key: _KEY_TYPES[kind] for key, kind in plan.join_keys.items()}
        required |= {name: _FEAST_TYPES[dtype] for name, dtype in plan.request_fields.items()}
        required |= {name: _FIELD_TYPES[kind] for name, kind in contract.request_fields.items()}
        stored = {
            name: _STORED_TYPES[plan.value_types[name]]
            for name in plan.references
            if plan.value_types[name] in _STORED_TYPES and name not in plan.inputs
        }
        # JSON names need not be Python's, so the attributes are numbered and renamed.
        attributes = {name: f"f{index}" for index, name in enumerate([*required, *stored])}
        self._positions = {name: index for index, name in enumerate(required)}
        self._stored = {name: len(required) + index for index, name in enumerate(stored)}
        self._max_instances = contract.limits.max_instances
        self._form = repr((required, stored, self._max_instances))
        names = {attribute: name for name, attribute in attributes.items()}
        fields: list[Any] = [(attributes[name], kind) for name, kind in required.items()]
        optional = [(attributes[name], kind, msgspec.UNSET) for name, kind in stored.items()]
        self._request_type = _request_type(fields + optional, names)
        self._decoder = msgspec.json.Decoder(self._request_type)
        # Of requests that give no stored feature, as most do: with dozens of features a third of
        # the time goes into what is not there.
        self._plain_decoder = (
            msgspec.json.Decoder(_request_type(fields, names)) if stored else self._decoder
        )

    def reads_as(self, other: "InstanceDecoder") -> bool:
        """Whether what it decodes is what the other one does."""
        return self is other or self._form == other._form

    @property
    def required(self) -> tuple[str, ...]:
        """What every instance must hold: join keys, then request fields."""
        return tuple(self._positions)

    def decode(self, body: bytes, *, max_instances: int | None = None) -> Instances:
        """Raises `InvalidInput` naming the field, `PayloadTooLarge` over the limit of instances,
        which `max_instances` replaces."""
        is_plain = True
        try:
            request: Any = self._plain_decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            is_plain = False
            request = self._decoded(body)
        instances = request.instances
        if not instances:
            raise InvalidInput("instances: must not be empty", field="instances")
        limit = max_instances or self._max_instances
        if len(instances) > limit:
            raise PayloadTooLarge(f"instances: {len(instances)} given, at most {limit} are allowed")
        rows: list[Row] = [_as_tuple(instance) for instance in instances]
        if is_plain:
            return Instances(rows, self._positions, _NONE, request.verbose)
        overrides = self._overrides(rows)
        rows = [row[: len(self._positions)] for row in rows]
        return Instances(rows, self._positions, overrides, request.verbose)

    def _decoded(self, body: bytes) -> Any:
        """What it is, or what is wrong with it."""
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as exc:
            raise misfit(str(exc)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise malformed(str(exc), body) from None

    def schema(self, prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """JSON schema of the request body, and of the components that it refers to, whose names
        begin with `prefix`."""
        (schema,), components = msgspec.json.schema_components(
            [self._request_type], ref_template=f"#/components/schemas/{prefix}{{name}}"
        )
        return schema, {f"{prefix}{name}": part for name, part in components.items()}

    def _overrides(self, rows: Sequence[Row]) -> Mapping[str, Sequence[Any]]:
        columns = {name: [row[index] for row in rows] for name, index in self._stored.items()}
        return {
            name: values
            for name, values in columns.items()
            if any(value is not msgspec.UNSET for value in values)
        }


def _request_type(fields: Sequence[Any], names: Mapping[str, str]) -> Any:
    """`names` has the JSON name of each field of an instance."""
    instance: Any = msgspec.defstruct(
        "Instance", fields, rename=dict(names), forbid_unknown_fields=True, gc=False
    )
    return msgspec.defstruct(
        "PredictRequest",
        [("instances", list[instance]), ("verbose", bool, False)],
        forbid_unknown_fields=True,
    )


def misfit(text: str) -> InvalidInput:
    """`Expected `float`, got `str` - at `$.instances[0].distance`` → names that field."""
    fault, _, path = text.rpartition(" - at ") if " - at " in text else (text, "", "")
    field = path.strip("`").removeprefix("$").removeprefix(".")
    named = re.search(r"(?:missing required|unknown) field `(.+)`", fault)
    if named:
        name = named[1][:_SHOWN]  # a caller's megabyte does not come back three times
        fault = fault.replace(named[1], name)
        field = f"{field}.{name}".removeprefix(".")
    field = field or "body"
    return InvalidInput(f"{field}: {fault[0].lower()}{fault[1:]}", field=field)


def malformed(text: str, body: bytes) -> InvalidInput:
    """Names the key in whose value the syntax breaks, where it breaks in a plain value."""
    position = re.search(r"byte (\d+)", text)
    read = body[: int(position[1])] if position else b""
    key = re.search(rb'"([^"\\]{1,256})"\s*:[^"{}\[\],]*\Z', read)
    where = key[1].decode("utf-8", "replace") if key else "body"
    hint = ", which has no NaN or Infinity" if body[len(read) :][:1] in {b"N", b"I", b"-"} else ""
    return InvalidInput(f"{where}: the body is not valid JSON{hint} ({text})", field=where)
