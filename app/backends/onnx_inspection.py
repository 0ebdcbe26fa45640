"""Looks at an ONNX file before the runtime sees it: refuses what could harm or only look valid."""

import math
import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeAlias

import onnx
from google.protobuf.message import DecodeError
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    numpy_helper,
)

from app.backends.external_data import ExternalFiles, is_printable, open_file
from app.backends.onnx_operators import known_operators, newest_versions
from app.errors import InvalidModel

_MOST_FILE_BYTES = (1 << 31) - 1  # of a protobuf
_MOST_NODES = 200_000
_MOST_DEPTH = 16
_MOST_NAME = 256
_MOST_ELEMENTS = 1 << 40  # of a tensor that the file claims to hold, or a signature to take
_MOST_MADE = 1 << 28  # elements that one node makes of a constant: a GB of float32
_MOST_READ = 1_024  # elements of a constant that is looked into
_OLDEST_IR = 3
_OLDEST_OPSETS = {"": 7, "ai.onnx.ml": 1, "com.microsoft": 1}
"""The domains that may be used, by the oldest version that ONNX Runtime is tested with."""
_REFUSED_OPERATORS = {
    ("com.microsoft", name)
    for name in ("EPContext", "PythonOp", "PythonOpGrad", "TritonOp", "Snpe", "ExternalGraph")
}
"""They load code or files that the inspection cannot see."""
_CONFIGURATION = "ort_config"
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
}
_BITS = {
    getattr(TensorProto, name): bits
    for bits, names in {
        2: ("UINT2", "INT2"),
        4: ("UINT4", "INT4", "FLOAT4E2M1"),
        8: (
            *("BOOL", "UINT8", "INT8", "FLOAT8E8M0"),
            *("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"),
        ),
        16: ("UINT16", "INT16", "FLOAT16", "BFLOAT16"),
        32: ("UINT32", "INT32", "FLOAT"),
        64: ("UINT64", "INT64", "DOUBLE", "COMPLEX64"),
        128: ("COMPLEX128",),
    }.items()
    for name in names
    if hasattr(TensorProto, name)
}

Constants: TypeAlias = ChainMap[str, TensorProto]
_FunctionId: TypeAlias = tuple[str, str, str]


def inspect_file(model: Path, files: Sequence[str] | None) -> None:
    """Raises `InvalidModel` with one sentence unless the file is an ONNX model of known operators
    that holds what it claims, and names as external data only such regular files of its folder as
    are in `files` (None: any of them)."""
    proto = _parsed(model)
    external = ExternalFiles(model.parent, files, but_not=model.name)
    _Inspection(str(model), external).model(proto)


def _parsed(model: Path) -> ModelProto:
    with open_file(model.parent, model.name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MOST_FILE_BYTES:
            raise InvalidModel(
                f"{model}: {size} bytes: a file above 2 GiB needs its weights as external data"
            )
        content = file.read()
    for magic, what in _OTHER_FORMATS.items():
        if content.startswith(magic):
            raise InvalidModel(f"{model}: is {what}, not an ONNX model")
    if content[4:8] == b"ORTM":
        raise InvalidModel(f"{model}: is a file in ORT's own format, not an ONNX model")
    try:
        proto: ModelProto = ModelProto.FromString(content)
    except DecodeError as exc:
        raise InvalidModel(f"{model}: is no ONNX model, or not all of one: {exc}") from exc
    if not proto.HasField("graph") or not proto.graph.node:
        raise InvalidModel(f"{model}: is no ONNX model: it has no graph with nodes")
    return proto


@dataclass
class _Inspection:
    """One file under inspection. `what` is named in every reason."""

    what: str
    external: ExternalFiles
    operators: Mapping[str, Mapping[str, int]] = field(default_factory=known_operators)
    functions: dict[_FunctionId, FunctionProto] = field(default_factory=dict)
    sizes: dict[_FunctionId, int] = field(default_factory=dict)
    """Nodes of the functions that were inspected, those that they call counted each time."""
    open: set[_FunctionId] = field(default_factory=set)

    def model(self, model: ModelProto) -> None:
        if not _OLDEST_IR <= model.ir_version <= onnx.IR_VERSION:
            self._refuse(f"IR version {model.ir_version} is not {_OLDEST_IR} to {onnx.IR_VERSION}")
        if model.training_info:
            self._refuse("holds graphs for training: export it for inference")
        if any(entry.key == _CONFIGURATION for entry in model.metadata_props):
            self._refuse(f"its metadata holds a configuration of the runtime ({_CONFIGURATION})")
        for function in model.functions:
            self._declare(function)
        opsets = self._opsets(model.opset_import)
        for value in (*model.graph.input, *model.graph.output):
            if not is_printable(value.name) or len(value.name) > _MOST_NAME:
                self._refuse(
                    f"the name {_named(value.name)} of an input or output cannot be printed, or is "
                    f"longer than {_MOST_NAME} characters"
                )
        self._count(self._graph(model.graph, opsets, Constants(), 0))
        for identity in self.functions:
            self._function(identity, 0)
        self.external.check_overlaps()

    def _declare(self, function: FunctionProto) -> None:
        identity = (_domain(function.domain), function.name, function.overload)
        if identity in self.functions:
            self._refuse(f"defines the function {_named(function.name)} twice")
        if function.name in self.operators.get(identity[0], {}) or identity[0] == "":
            self._refuse(f"defines the operator {_named(function.name)}, which exists already")
        self.functions[identity] = function

    def _opsets(self, imports: Iterable[onnx.OperatorSetIdProto]) -> Mapping[str, int]:
        """The versions by domain."""
        newest = newest_versions()
        opsets: dict[str, int] = {}
        for imported in imports:
            domain, version = _domain(imported.domain), imported.version
            if opsets.get(domain, version) != version:
                self._refuse(f"imports two versions of the domain {_shown(domain)}")
            opsets[domain] = version
            if domain not in _OLDEST_OPSETS:
                continue  # it is refused where something of it is used
            oldest = _OLDEST_OPSETS[domain]
            if not oldest <= version <= newest[domain]:
                self._refuse(
                    f"opset {version} of the domain {_shown(domain)} is not one of those that the "
                    f"installed ONNX Runtime executes, {oldest} to {newest[domain]}"
                )
        return opsets

    def _function(self, identity: _FunctionId, depth: int) -> int:
        """How many nodes a call of it stands for."""
        if identity in self.sizes:
            return self.sizes[identity]
        if identity in self.open:
            self._refuse(f"the function {_named(identity[1])} calls itself")
        function = self.functions[identity]
        self.open.add(identity)
        opsets = self._opsets(function.opset_import)
        self.sizes[identity] = self._nodes(function.node, opsets, Constants(), depth + 1)
        self.open.remove(identity)
        return self.sizes[identity]

    def _graph(
        self, graph: GraphProto, opsets: Mapping[str, int], outer: Constants, depth: int
    ) -> int:
        """How many nodes it has, with those of its subgraphs and functions."""
        if depth > _MOST_DEPTH:
            self._refuse(f"graphs lie in each other more than {_MOST_DEPTH} deep")
        constants = outer.new_child()
        for tensor in graph.initializer:
            self._tensor(tensor, f"initializer {_named(tensor.name)}")
            constants[tensor.name] = tensor
        for sparse in graph.sparse_initializer:
            self._sparse(sparse, "a sparse initializer")
        for value in (*graph.input, *graph.output, *graph.value_info):
            self._value(value)
        return self._nodes(graph.node, opsets, constants, depth)

    def _nodes(
        self,
        nodes: Iterable[NodeProto],
        opsets: Mapping[str, int],
        constants: Constants,
        depth: int,
    ) -> int:
        if depth > _MOST_DEPTH:
            self._refuse(f"graphs and functions lie in each other more than {_MOST_DEPTH} deep")
        count = 0
        for node in nodes:
            count += self._operator(node, opsets, depth)
            for attribute in node.attribute:
                count += self._attribute(node, attribute, opsets, constants, depth)
            self._count(count)
            self._made(node, constants)
            if node.op_type == "Constant" and node.output:
                for attribute in node.attribute:
                    if attribute.name == "value":
                        constants[node.output[0]] = attribute.t
                    elif attribute.name == "value_ints":
                        constants[node.output[0]] = _tensor_of(attribute.ints)
                    elif attribute.name == "value_int":
                        constants[node.output[0]] = _tensor_of([attribute.i])
        return count

    def _count(self, nodes: int) -> None:
        if nodes > _MOST_NODES:
            self._refuse(f"has more than {_MOST_NODES} nodes, those of functions counted by call")

    def _operator(self, node: NodeProto, opsets: Mapping[str, int], depth: int) -> int:
        """How many nodes it stands for."""
        domain, name = _domain(node.domain), node.op_type
        identity = (domain, name, node.overload)
        if identity in self.functions:
            return self._function(identity, depth)
        operator = f"operator {_named(name)}"
        if domain not in _OLDEST_OPSETS:
            self._refuse(
                f"{operator} is of the domain {_shown(domain)}: only operators of "
                f"{', '.join(map(_shown, _OLDEST_OPSETS))} are served"
            )
        if domain not in opsets:
            self._refuse(f"{operator} is of the domain {_shown(domain)}, which is not imported")
        since = self.operators[domain].get(name)
        if since is None:
            self._refuse(f"the installed ONNX Runtime knows no {operator} in {_shown(domain)}")
        if since > opsets[domain]:
            self._refuse(f"{operator} is there since opset {since}, imported is {opsets[domain]}")
        if (domain, name) in _REFUSED_OPERATORS:
            self._refuse(f"{operator} loads code or files of its own")
        return 1

    def _attribute(
        self,
        node: NodeProto,
        attribute: AttributeProto,
        opsets: Mapping[str, int],
        constants: Constants,
        depth: int,
    ) -> int:
        """How many nodes lie in it."""
        where = f"attribute {_named(attribute.name)} of a {_named(node.op_type)}"
        tensors = [attribute.t] if attribute.HasField("t") else []
        for tensor in (*tensors, *attribute.tensors):
            self._tensor(tensor, where)
        sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for each in (*sparse, *attribute.sparse_tensors):
            self._sparse(each, where)
        graphs = [attribute.g] if attribute.HasField("g") else []
        return sum(
            self._graph(graph, opsets, constants, depth + 1)
            for graph in (*graphs, *attribute.graphs)
        )

    def _sparse(self, sparse: onnx.SparseTensorProto, where: str) -> None:
        self._tensor(sparse.values, f"{where}, its values")
        self._tensor(sparse.indices, f"{where}, its indices")
        self._elements(sparse.dims, where)
        # It is made dense when it is loaded.
        if math.prod(sparse.dims) > _MOST_MADE:
            self._refuse(f"{where} would take {math.prod(sparse.dims)} elements when it is dense")

    def _value(self, value: ValueInfoProto) -> None:
        dims = value.type.tensor_type.shape.dim
        known = [dim.dim_value for dim in dims if dim.HasField("dim_value")]
        # Some tools write -1 for any length.
        self._elements([size for size in known if size != -1], f"the value {_named(value.name)}")

    def _elements(self, dims: Iterable[int], where: str) -> int:
        """How many there are in such a shape."""
        sizes = list(dims)
        if any(size < 0 for size in sizes):
            self._refuse(f"{where} has a negative dimension: {_shortened(sizes)}")
        count = math.prod(sizes)
        if count > _MOST_ELEMENTS or any(size > _MOST_ELEMENTS for size in sizes):
            self._refuse(f"{where} claims more elements than can be: {_shortened(sizes)}")
        return count

    def _tensor(self, tensor: TensorProto, where: str) -> None:
        """It holds as much data as its shape says."""
        count = self._elements(tensor.dims, where)
        if tensor.HasField("segment"):
            self._refuse(f"{where} is a segment of a tensor")
        texts = tensor.data_type == TensorProto.STRING
        bits = _BITS.get(tensor.data_type)
        if bits is None and not texts:
            self._refuse(f"{where} is of the unknown type {tensor.data_type}")
        size = -(-count * (bits or 0) // 8)
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            if texts:
                self._refuse(f"{where} has texts as external data")
            entries = [(entry.key, entry.value) for entry in tensor.external_data]
            self.external.check(entries, size, f"{self.what}: {where}")
            return
        if tensor.HasField("raw_data"):
            held = len(tensor.raw_data)
            if held != size or texts:
                self._refuse(f"{where} holds {held} bytes, not the {size} of its shape")
            return
        found = _typed_count(tensor)
        packed = {count, -(-count * (bits or 0) // 8)} if bits and bits < 8 else {count}
        if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
            packed = {2 * count}
        if found not in packed:
            self._refuse(f"{where} holds {found} elements, not the {count} of its shape")

    def _made(self, node: NodeProto, constants: Constants) -> None:
        """What it makes of constants has a size that can be."""
        made = max(_elements_made(node, constants), default=0)
        if made > _MOST_MADE:
            self._refuse(
                f"a {_named(node.op_type)} makes {made:.3g} elements of a constant, more than "
                f"{_MOST_MADE}"
            )

    def _refuse(self, reason: str) -> NoReturn:
        raise InvalidModel(f"{self.what}: {reason}")


def _typed_count(tensor: TensorProto) -> int:
    return max(
        len(tensor.float_data),
        len(tensor.int32_data),
        len(tensor.string_data),
        len(tensor.int64_data),
        len(tensor.double_data),
        len(tensor.uint64_data),
    )


def _elements_made(node: NodeProto, constants: Constants) -> Iterator[float]:
    """As many as can be seen without executing anything: at least so many."""

    def numbers(place: int) -> list[float]:
        name = node.input[place] if place < len(node.input) else ""
        return _numbers(constants[name]) if name and name in constants else []

    match node.op_type:
        case "ConstantOfShape" | "BlackmanWindow" | "HannWindow" | "HammingWindow":
            yield _product(numbers(0))
        case "Expand" | "Tile":
            yield _product(numbers(1))
        case "OneHot":
            yield _product(numbers(1))
        case "Pad":
            yield from map(abs, numbers(1))
        case "Resize" | "Upsample":
            for place in (1, 2, 3):
                yield _product(numbers(place))
        case "Range":
            ends = [numbers(place) for place in range(3)]
            if all(len(end) == 1 for end in ends):
                (start,), (limit,), (delta,) = ends
                yield (limit - start) / delta if delta else math.inf
        case "RandomNormal" | "RandomUniform":
            for attribute in node.attribute:
                if attribute.name == "shape":
                    yield _product(attribute.ints)


def _numbers(tensor: TensorProto) -> list[float]:
    """Of a small tensor of numbers that lie in the file; none of another."""
    small = math.prod(tensor.dims) <= _MOST_READ and len(tensor.dims) <= 2
    if not small or tensor.external_data or tensor.data_type == TensorProto.STRING:
        return []
    return [float(value) for value in numpy_helper.to_array(tensor).ravel().tolist()]


def _product(sizes: Iterable[float]) -> float:
    """Of those that enlarge; 0 where one of them is."""
    return math.prod(max(size, 0.0) for size in sizes) if sizes else 0.0


def _tensor_of(values: Iterable[int]) -> TensorProto:
    whole = list(values)[: _MOST_READ + 1]
    return TensorProto(data_type=TensorProto.INT64, dims=[len(whole)], int64_data=whole)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _shown(domain: str) -> str:
    return _named(domain or "ai.onnx")


def _named(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:80]}…")


def _shortened(dims: Iterable[int]) -> str:
    sizes = list(dims)
    return str(sizes) if len(sizes) <= 8 else f"{sizes[:8]}… of {len(sizes)}"
