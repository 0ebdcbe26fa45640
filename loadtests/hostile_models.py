"""A corpus of model files that a hostile, or careless, publisher could put into a repository."""

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from app.contract import Contract
from app.features.plan import NO_FEATURES
from app.repository.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    PLAN_FILE,
    Manifest,
    Training,
    describe,
    feature_origin,
    read_manifest,
)
from app.repository.origin import environment, publisher, source_of
from app.repository.vault import VaultedVersion

# They ask git and every installed package.
_publisher, _environment = cache(publisher), cache(environment)
_source = cache(lambda: source_of(Path()))

SECRET = "secret"
"""A file beside the version's folder, which no model may read."""
CONTRACT = Contract.model_validate(
    {
        "request_fields": {"a": "float", "b": "float"},
        "inputs": [{"tensor": "x", "columns": ["a", "b"]}],
        "outputs": {"value": {"tensor": "y"}},
        "batching": {"max_batch_rows": 8},
    }
)
"""Of all of them: `y` = a + 2 b."""
_GOLDEN = ((2.0, 1.0), (0.0, 0.5), (-1.0, 3.0))
_SIGNATURE = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": [2]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": [1]}],
}
_FLOAT = TensorProto.FLOAT
_INT = TensorProto.INT64
_FOR_EVER = (1 << 63) - 1


@dataclass(frozen=True)
class Hostile:
    """`write` puts the files of a version into its folder; the model is refused with `reason`, a
    regular expression. `listed`: the manifest lists all that was written."""

    name: str
    reason: str
    write: Callable[[Path], object]
    listed: bool = True
    signature: Mapping[str, Any] = field(default_factory=lambda: _SIGNATURE)


def publish_as_it_is(hostile: Hostile, folder: Path) -> VaultedVersion:
    """The version in that folder, which is made, with the manifest that `hikyaku publish` would
    have written if it had believed everything."""
    folder.mkdir(parents=True)
    (folder.parent / SECRET).write_bytes(b"secret " * 1_000)
    (folder / PLAN_FILE).write_bytes(NO_FEATURES.to_json())
    before = {PLAN_FILE}
    hostile.write(folder)
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and (hostile.listed or path.name in {MODEL_FILE, *before})
    )
    golden = {
        "instances": [{"a": a, "b": b} for a, b in _GOLDEN],
        "predictions": [{"value": a + 2 * b} for a, b in _GOLDEN],
    }
    training = {
        "golden": golden,
        "metrics": {},
        "data_window": {"start": "2013-01-01", "end": "2013-09-01", "rows": 3},
        "hyperparameters": {},
    }
    manifest = Manifest(
        model="hostile",
        version=1,
        published_at="2013-09-01T00:00:00+00:00",
        published_by=_publisher(),
        files={name: describe(folder / name) for name in names},
        signature=hostile.signature,
        inputs=CONTRACT.inputs_document(),
        feature_order=["a", "b"],
        features=feature_origin(NO_FEATURES),
        training=Training.model_validate(training),
        fingerprint="hostile",
        source=_source(),
        environment=_environment(),
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.to_json())
    return VaultedVersion(folder, *read_manifest(folder))


def honest(folder: Path) -> None:
    """What a good model with its weights beside it looks like: the control of the corpus."""
    (folder / "weights.bin").write_bytes(np.array([1, 2], np.float32).tobytes())
    write(folder, model([matmul()], [external("weights", [2, 1], location="weights.bin")]))


def floats(name: str, *dims: Any) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, _FLOAT, dims)


def tensor(name: str, value: Any, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype), name)


def _number(value: Any) -> NDArray[Any]:
    array = np.array(value)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)


WEIGHTS = tensor("weights", [[1.0], [2.0]])


def matmul(x: str = "x", y: str = "y") -> NodeProto:
    return helper.make_node("MatMul", [x, "weights"], [y])


def graph(
    nodes: Sequence[NodeProto],
    initializers: Sequence[TensorProto] = (WEIGHTS,),
    inputs: Sequence[ValueInfoProto] | None = None,
    outputs: Sequence[ValueInfoProto] | None = None,
) -> GraphProto:
    inputs = [floats("x", "rows", 2)] if inputs is None else inputs
    outputs = [floats("y", "rows", 1)] if outputs is None else outputs
    return helper.make_graph(nodes, "hostile", inputs, outputs, initializers)


def model(
    nodes: Sequence[NodeProto],
    initializers: Sequence[TensorProto] = (WEIGHTS,),
    *,
    opsets: Mapping[str, int] | None = None,
    functions: Sequence[FunctionProto] = (),
    **of_graph: Any,
) -> ModelProto:
    imports = [helper.make_opsetid(*each) for each in (opsets or {"": 17}).items()]
    made = graph(nodes, initializers, **of_graph)
    return helper.make_model(made, ir_version=9, opset_imports=imports, functions=functions)


def write(folder: Path, proto: ModelProto) -> None:
    (folder / MODEL_FILE).write_bytes(proto.SerializeToString())


def external(name: str, dims: Sequence[int], **entries: Any) -> TensorProto:
    """A tensor of floats whose data lie elsewhere."""
    made = TensorProto(name=name, data_type=_FLOAT, dims=dims)
    made.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        made.external_data.add(key=key, value=str(value))
    return made


def corpus() -> list[Hostile]:
    """Every one of them."""
    return [
        *seen_without_executing(),
        *_bombs(),
        *_endless(),
        *_ill_formed(),
        *_signatures(),
        *_wrong_answers(),
        *_crashes(),
    ]


def reaching_out() -> list[Hostile]:
    """Those of them that name files."""
    return list(_external_data())


def seen_without_executing() -> list[Hostile]:
    """Those of them that no runtime ever sees."""
    return [*_external_data(), *_no_models(), *_claims(), *_unknown()]


def _with_weights(**entries: Any) -> Callable[[Path], None]:
    """A model whose weights are at those entries."""

    def written(folder: Path) -> None:
        write(folder, model([matmul()], [external("weights", [2, 1], **entries)]))

    return written


def _both(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        for step in steps:
            step(folder)

    return written


def _external_data() -> Iterator[Hostile]:
    def file(name: str, size: int = 8) -> Callable[[Path], object]:
        def written(folder: Path) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(bytes(size))

        return written

    def linked(name: str, target: str) -> Callable[[Path], object]:
        return lambda folder: (folder / name).symlink_to(target)

    out = "leads out of the model's folder"
    yield Hostile("traversal", out, _with_weights(location="../../../../../../etc/passwd"))
    yield Hostile("traversal to the neighbour", out, _with_weights(location=f"../{SECRET}"))
    yield Hostile(
        "traversal through a folder",
        out,
        _both(file("sub/w.bin"), _with_weights(location=f"sub/../../{SECRET}")),
    )
    yield Hostile("absolute path", "is an absolute path", _with_weights(location="/etc/passwd"))
    yield Hostile("a device", "is an absolute path", _with_weights(location="/dev/zero"))
    yield Hostile("a URL", "is not the plain path", _with_weights(location="file:///etc/passwd"))
    backslash = _with_weights(location="..\\..\\etc\\passwd")
    yield Hostile("backslashes", "is no name of a file", backslash)
    yield Hostile("no location", "is no name of a file", _with_weights(location=""))
    nul = _with_weights(location="w.bin\0../secret")
    yield Hostile("a NUL in the location", r"w\.bin\\x00.* cannot be printed", nul)
    yield Hostile(
        "escape codes", r"w\\x1b\[2J.* cannot be printed", _with_weights(location="w\x1b[2J")
    )
    dotted = _both(file("w.bin"), _with_weights(location="./w.bin"))
    yield Hostile("a detour", "is not the plain path", dotted)
    address = "*/_ORT_MEM_ADDR_/*"
    at_an_address = _both(file(address), _with_weights(location=address, offset=4096, length=8))
    yield Hostile("an address in memory", "is not the plain path", at_an_address, listed=False)
    to_secret = _both(linked("w.bin", f"../{SECRET}"), _with_weights(location="w.bin"))
    yield Hostile("a symlink that is listed", "is a link", to_secret)
    yield Hostile("a symlink that is not listed", "not listed", to_secret, listed=False)
    behind = _both(linked("sub", ".."), _with_weights(location=f"sub/{SECRET}"))
    yield Hostile("a symlink to a folder", "is a link|not listed", behind)
    hard = _both(
        lambda folder: os.link(folder.parent / SECRET, folder / "w.bin"),
        _with_weights(location="w.bin"),
    )
    yield Hostile("a hard link", "is a hard link", hard)
    pipe = _both(lambda folder: os.mkfifo(folder / "w.bin"), _with_weights(location="w.bin"))
    yield Hostile("a pipe", "not listed", pipe)
    folder = _both(file("w.bin/inside"), _with_weights(location="w.bin"))
    yield Hostile("a folder", "not listed", folder)
    yield Hostile("not listed", "not listed", _both(file("w"), _with_weights(location="w")), False)
    yield Hostile("not there", "not listed", _with_weights(location="w.bin"))
    short = _both(file("w.bin", 7), _with_weights(location="w.bin"))
    yield Hostile("too short", "bytes 0 to 8 of 'w.bin', which has 7", short)
    beyond = _both(file("w.bin"), _with_weights(location="w.bin", offset=1 << 40, length=8))
    yield Hostile("beyond the end", r"bytes \d+ to \d+ of 'w.bin', which has 8", beyond)
    negative = _both(file("w.bin"), _with_weights(location="w.bin", offset=-8))
    yield Hostile("a negative offset", "offset '-8' .*is no number", negative)
    huge = _both(file("w.bin"), _with_weights(location="w.bin", length=10**30))
    yield Hostile("a length that overflows", "length '1000.*is no number", huge)
    longer = _both(file("w.bin", 64), _with_weights(location="w.bin", length=64))
    yield Hostile("longer than its shape", "64 bytes of external data for a shape of 8", longer)
    itself = _with_weights(location=MODEL_FILE)
    yield Hostile("the model file itself", "is the model file itself", itself)

    def twice(folder: Path) -> None:
        made = external("weights", [2, 1], location="w.bin")
        made.external_data.add(key="location", value=f"../{SECRET}")
        write(folder, model([matmul()], [made]))

    yield Hostile("two locations", "has the entries", _both(file("w.bin"), twice))

    def overlapping(folder: Path) -> None:
        claims = [external(f"w{at}", [1 << 18], location="w.bin") for at in range(2_000)]
        write(folder, model([matmul()], [WEIGHTS, *claims]))

    both = _both(file("w.bin", 1 << 20), overlapping)
    yield Hostile("a file 2,000 times in memory", "overlaps in 'w.bin'", both)

    def hidden(place: Callable[[TensorProto], ModelProto]) -> Callable[[Path], None]:
        return lambda folder: write(folder, place(external("w", [1], location=f"../{SECRET}")))

    yield Hostile("in a constant", out, hidden(_in_a_constant))
    yield Hostile("in the body of a loop", out, hidden(_in_a_loop))
    yield Hostile("in a function", out, hidden(_in_a_function))
    yield Hostile("in a sparse initializer", out, hidden(_in_a_sparse_initializer))


def _constant(value: TensorProto, name: str = "w") -> NodeProto:
    return helper.make_node("Constant", [], [name], value=value)


def _in_a_constant(value: TensorProto) -> ModelProto:
    return model([_constant(value), matmul()])


def _in_a_loop(value: TensorProto) -> ModelProto:
    return model([_loop(2, initializers=[value]), matmul("looped")], [WEIGHTS, *_LOOP_CONSTANTS])


def _in_a_function(value: TensorProto) -> ModelProto:
    made = _function("Hidden", [_constant(value), helper.make_node("Identity", ["i"], ["o"])])
    nodes = [helper.make_node("Hidden", ["x"], ["same"], domain="local"), matmul("same")]
    return model(nodes, opsets={"": 17, "local": 1}, functions=[made])


def _in_a_sparse_initializer(value: TensorProto) -> ModelProto:
    made = model([matmul()])
    sparse = made.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(value)
    sparse.indices.CopyFrom(tensor("", [0], np.int64))
    return made


def _function(name: str, nodes: Sequence[NodeProto], domain: str = "local") -> FunctionProto:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function(domain, name, ["i"], ["o"], nodes, imports)


_LOOP_CONSTANTS = (
    tensor("for_ever", _FOR_EVER, np.int64),
    tensor("some", 2, np.int64),
    tensor("yes", True, np.bool_),
)


def _loop(
    turns: int | None,
    *inner: NodeProto,
    initializers: Sequence[TensorProto] = (),
    at: str = "",
) -> NodeProto:
    """`looped` = `x` after so many turns, for ever without a number; `at` makes its names others
    than those of a loop in it."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", [f"go{at}"], [f"go_on{at}"]),
            *(inner or [helper.make_node("Neg", [f"value{at}"], [f"turned{at}"])]),
        ],
        "turn",
        [
            helper.make_tensor_value_info(f"turn{at}", _INT, []),
            helper.make_tensor_value_info(f"go{at}", TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"value{at}", _FLOAT, None),
        ],
        [
            helper.make_tensor_value_info(f"go_on{at}", TensorProto.BOOL, []),
            helper.make_tensor_value_info(f"turned{at}", _FLOAT, None),
        ],
        initializers,
    )
    count = "for_ever" if turns is None else "some"
    return helper.make_node("Loop", [count, "yes", "x"], ["looped"], body=body)


def _no_models() -> Iterator[Hostile]:
    def content(data: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / MODEL_FILE).write_bytes(data)

    whole = model([matmul()]).SerializeToString()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    zeros = io.BytesIO()
    with zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("model.onnx", bytes(50_000_000))
    noise = random.Random(5).randbytes(10_000)
    none = "is no ONNX model"
    yield Hostile("empty", none, content(b""))
    yield Hostile("truncated", none, content(whole[:-20]))
    yield Hostile("half", none, content(whole[: len(whole) // 2]))
    yield Hostile("random bytes", none, content(noise))
    yield Hostile("zeros", none, content(bytes(1 << 20)))
    yield Hostile("text", none, content(b"<html>404 Not Found</html>"))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield Hostile("a pointer of Git LFS", none, content(pointer))
    yield Hostile("JSON", none, content(json.dumps({"graph": {}}).encode()))
    yield Hostile("a pickle", "is a pickle", content(pickle.dumps({"a": 1})))
    yield Hostile("a zip of a pickle", "is a zip archive", content(archive.getvalue()))
    yield Hostile("a zip bomb", "is a zip archive", content(zeros.getvalue()))
    yield Hostile("a program", "is a program", content(b"\x7fELF" + noise))
    ort = content(b"\x1c\0\0\0ORTM" + noise)
    yield Hostile("ORT's own format", "is a file in ORT's own format", ort)
    yield Hostile("no graph", none, content(ModelProto(ir_version=9).SerializeToString()))
    yield Hostile("no nodes", none, lambda folder: write(folder, model([])))
    yield Hostile(
        "a symlink to a model",
        "is a link",
        _both(
            lambda folder: (folder.parent / "other").write_bytes(whole),
            lambda folder: (folder / MODEL_FILE).symlink_to("../other"),
        ),
    )


def _claims() -> Iterator[Hostile]:
    def claiming(**claim: Any) -> Callable[[Path], None]:
        made = TensorProto(name="w", **{"data_type": _FLOAT, **claim})
        return lambda folder: write(folder, model([matmul()], [WEIGHTS, made]))

    raw = bytes(8)
    yield Hostile("2^31 floats in no bytes", "holds 0 elements", claiming(dims=[1 << 31]))
    overflow = claiming(dims=[1 << 32, 1 << 32], raw_data=raw)
    yield Hostile("a product that overflows to 0", "more elements than can be", overflow)
    most = claiming(dims=[_FOR_EVER, 0], raw_data=b"")
    yield Hostile("the largest dimension", "more elements than can be", most)
    yield Hostile("negative dims", "negative dimension", claiming(dims=[-1, -2], raw_data=raw))
    yield Hostile(
        "too little data", "holds 8 bytes, not the 400", claiming(dims=[100], raw_data=raw)
    )
    yield Hostile("too much data", "holds 8 bytes, not the 4 ", claiming(dims=[1], raw_data=raw))
    typed = claiming(dims=[3], float_data=[1.0])
    yield Hostile("too few elements", "holds 1 elements, not the 3", typed)
    yield Hostile("an unknown type", "unknown type 99", claiming(data_type=99, dims=[1]))
    yield Hostile("no type", "unknown type 0", claiming(data_type=0, dims=[1], raw_data=raw))

    def sparse(folder: Path) -> None:
        made = _in_a_sparse_initializer(tensor("w", [1.0]))
        made.graph.sparse_initializer[0].dims[:] = [1 << 35]
        write(folder, made)

    yield Hostile("a sparse tensor of 2^35", "elements when it is dense", sparse)
    wide = [floats("x", 1 << 31, 1 << 31)]
    yield Hostile(
        "an input of 2^62",
        "more elements than can be",
        lambda folder: write(folder, model([matmul()], inputs=wide)),
    )


def _bombs() -> Iterator[Hostile]:
    """`y` is right, for whoever lives to see it."""
    large = 1 << 40

    def beside(*nodes: NodeProto, **constants: Any) -> Callable[[Path], None]:
        """The last node makes `bomb`."""
        given = [numpy_helper.from_array(_number(value), name) for name, value in constants.items()]
        # The sum is no number of any use, but it has to be made.
        used = [
            matmul(y="good"),
            *nodes,
            helper.make_node("ReduceMin", ["bomb"], ["least"], keepdims=0),
            helper.make_node("Mul", ["least", "nothing"], ["no"]),
            helper.make_node("Add", ["good", "no"], ["y"]),
        ]
        initializers = [WEIGHTS, tensor("nothing", 0.0), *given]
        return lambda folder: write(folder, model(used, initializers))

    def node(operator: str, *inputs: str, **attributes: Any) -> NodeProto:
        return helper.make_node(operator, inputs, ["bomb"], **attributes)

    made = "elements of a constant"
    filled = beside(node("ConstantOfShape", "shape"), shape=[large])
    yield Hostile("ConstantOfShape", made, filled)
    as_constant = beside(
        helper.make_node("Constant", [], ["shape"], value_ints=[large]),
        node("ConstantOfShape", "shape"),
    )
    yield Hostile("ConstantOfShape of a Constant", made, as_constant)
    yield Hostile("Expand", made, beside(node("Expand", "one", "to"), one=1.0, to=[large]))
    yield Hostile("Tile", made, beside(node("Tile", "one", "by"), one=[1.0], by=[large]))
    ranged = beside(node("Range", "zero", "end", "step"), zero=0.0, end=1e12, step=1.0)
    yield Hostile("Range", made, ranged)
    for_ever = beside(node("Range", "zero", "end", "step"), zero=0.0, end=1.0, step=0.0)
    yield Hostile("Range in steps of 0", "makes inf elements", for_ever)
    yield Hostile("RandomNormal", made, beside(node("RandomNormal", shape=[large])))
    padded = beside(node("Pad", "one", "by"), one=[1.0], by=[large, large])
    yield Hostile("Pad", made, padded)

    memory = "alloc|memory|needs more than|killed by|exceeds|Invalid|overflow|ended with"
    turned = helper.make_node("Neg", ["size"], ["negative"])
    hidden = [turned, helper.make_node("Neg", ["negative"], ["shape"])]
    at_run = beside(*hidden, node("ConstantOfShape", "shape"), size=[1 << 33])
    yield Hostile("ConstantOfShape at run time", memory, at_run)
    expanded = beside(*hidden, node("Expand", "one", "shape"), one=1.0, size=[1 << 33])
    yield Hostile("Expand at run time", memory, expanded)
    tiled = beside(*hidden, node("Tile", "row", "shape"), row=[1.0], size=[1 << 33])
    yield Hostile("Tile at run time", memory, tiled)
    overflowing = beside(*hidden, node("ConstantOfShape", "shape"), size=[1 << 62, 4])
    yield Hostile("a size that overflows at run time", memory, overflowing)
    doubled = [
        helper.make_node("Concat", [f"b{at}"] * 2, [f"b{at + 1}"], axis=0) for at in range(40)
    ]
    doubling = beside(
        helper.make_node("Identity", ["x"], ["b0"]), *doubled, node("Identity", "b40")
    )
    yield Hostile("doubled 40 times", memory, doubling)
    kept = [
        step
        for at in range(64)
        for step in (
            helper.make_node("Neg", ["size"], [f"n{at}"]),
            helper.make_node("Neg", [f"n{at}"], [f"s{at}"]),
            helper.make_node("ConstantOfShape", [f"s{at}"], [f"c{at}"]),
        )
    ]
    hog = beside(*kept, node("Sum", *(f"c{at}" for at in range(64))), size=[1 << 27])
    yield Hostile("64 times half a GB", memory, hog)
    rows = beside(
        helper.make_node("Shape", ["x"], ["shape_of_x"]),
        helper.make_node("Mul", ["shape_of_x", "many"], ["shape"]),
        node("ConstantOfShape", "shape"),
        many=[1 << 16, 1 << 16],
    )
    yield Hostile("a size by the rows", memory, rows)


def _endless() -> Iterator[Hostile]:
    late = "the deadline passed|was not open within"

    def looping(node: NodeProto) -> Callable[[Path], None]:
        constants = [WEIGHTS, *_LOOP_CONSTANTS]
        return lambda folder: write(folder, model([node, matmul("looped")], constants))

    yield Hostile("an endless Loop", late, looping(_loop(None)))
    inner = _loop(None, at="_inside")
    inner.input[2] = "value"
    inner.output[0] = "turned"
    yield Hostile("a Loop in a Loop", late, looping(_loop(None, inner)))

    def folding(folder: Path) -> None:
        """Constants that ONNX Runtime multiplies while it opens the file."""
        size = [tensor("size", [3_000, 3_000], np.int64)]
        nodes = [
            helper.make_node("ConstantOfShape", ["size"], ["m0"], value=tensor("", [1e-4])),
            *(helper.make_node("MatMul", [f"m{at}", "m0"], [f"m{at + 1}"]) for at in range(400)),
            helper.make_node("ReduceMin", ["m400"], ["least"], keepdims=0),
            matmul(y="good"),
            helper.make_node("Add", ["good", "least"], ["y"]),
        ]
        write(folder, model(nodes, [WEIGHTS, *size]))

    yield Hostile("slow to open", late, folding)

    def slow(folder: Path) -> None:
        """The same, but of the rows: slow to execute."""
        nodes = [
            helper.make_node("ReduceSum", ["x"], ["all"], keepdims=0),
            helper.make_node("Expand", ["all", "size"], ["m0"]),
            *(helper.make_node("MatMul", [f"m{at}", "m0"], [f"m{at + 1}"]) for at in range(400)),
            helper.make_node("ReduceMin", ["m400"], ["least"], keepdims=0),
            matmul(y="good"),
            helper.make_node("Add", ["good", "least"], ["y"]),
        ]
        write(folder, model(nodes, [WEIGHTS, tensor("size", [3_000, 3_000], np.int64)]))

    yield Hostile("slow to execute", late, slow)


def _unknown() -> Iterator[Hostile]:
    def using(
        operator: str, domain: str = "", opsets: Mapping[str, int] | None = None, **attributes: Any
    ) -> Callable[[Path], None]:
        used = helper.make_node(operator, ["x"], ["same"], domain=domain, **attributes)
        imports = {"": 17} if opsets is None else opsets
        made = model([used, matmul("same")], opsets={"": 17, domain: 1} | imports)
        return lambda folder: write(folder, made)

    yield Hostile("an unknown operator", "knows no operator 'Frobnicate'", using("Frobnicate"))
    own = using("Mine", "com.example")
    yield Hostile("a domain of its own", "'Mine' is of the domain 'com.example'", own)
    aten = using("ATen", "org.pytorch.aten", overload_name="eval")
    yield Hostile("an operator of PyTorch", "domain 'org.pytorch.aten'", aten)
    python = using("PythonOp", "com.microsoft", func_name="os.system")
    yield Hostile("a Python function", "knows no operator 'PythonOp'", python)
    context = using("EPContext", "com.microsoft", ep_cache_context=f"../{SECRET}", embed_mode=0)
    yield Hostile("a compiled file", "'EPContext' loads code or files", context)
    inside = using("Conv", "com.microsoft.nchwc")
    yield Hostile("a domain of the optimiser", "domain 'com.microsoft.nchwc'", inside)
    yield Hostile("no such contrib", "knows no operator 'Relu'", using("Relu", "com.microsoft"))
    homoglyph = using("Relu", "ai.\u043ennx")
    yield Hostile("a domain that looks like ONNX's", "is of the domain 'ai.\u043ennx'", homoglyph)
    newer = using("Identity", opsets={"": 9_999})
    yield Hostile("a newer opset", "opset 9999 of the domain 'ai.onnx'", newer)
    yield Hostile("opset 0", "opset 0 of the domain", using("Identity", opsets={"": 0}))
    negative = using("Identity", opsets={"": -1})
    yield Hostile("a negative opset", "opset -1 of the domain", negative)
    early = using("Mish", opsets={"": 13})
    yield Hostile("an operator before its time", "'Mish' is there since opset 18", early)

    def ir(folder: Path) -> None:
        made = model([matmul()])
        made.ir_version = 9_999
        write(folder, made)

    yield Hostile("a newer IR", "IR version 9999", ir)

    def configured(folder: Path) -> None:
        made = model([matmul()])
        entry = {"session_options": {"session.custom_ops": "/tmp/evil.so"}}
        made.metadata_props.add(key="ort_config", value=json.dumps(entry))
        write(folder, made)

    yield Hostile("a configuration of the runtime", r"configuration of the runtime", configured)

    def trained(folder: Path) -> None:
        made = model([matmul()])
        made.training_info.add()
        write(folder, made)

    yield Hostile("graphs for training", "graphs for training", trained)


def _ill_formed() -> Iterator[Hostile]:
    def nodes(*given: NodeProto, **options: Any) -> Callable[[Path], None]:
        return lambda folder: write(folder, model(given, **options))

    def step(operator: str, made_of: str, made: str, domain: str = "") -> NodeProto:
        return helper.make_node(operator, [made_of], [made], domain=domain)

    cannot = "cannot load it"
    cycle = nodes(step("Neg", "p", "q"), step("Neg", "q", "p"), matmul("p"))
    yield Hostile("a cycle", cannot, cycle)
    itself = nodes(step("Neg", "p", "p"), matmul("p"))
    yield Hostile("a node of itself", cannot, itself)
    yield Hostile("an output twice", cannot, nodes(matmul(), matmul()))
    yield Hostile("made of nothing", cannot, nodes(matmul("nowhere")))
    yield Hostile("an output that nothing makes", cannot, nodes(matmul(y="z")))
    yield Hostile("shapes that do not fit", cannot, nodes(matmul("weights")))

    def nested(depth: int) -> Callable[[Path], None]:
        def written(folder: Path) -> None:
            inner = helper.make_graph([step("Neg", "x", "e")], "leaf", [], [floats("e", None, 2)])
            for _ in range(depth):
                each = helper.make_node("If", ["yes"], ["e"], then_branch=inner, else_branch=inner)
                outputs = [floats("e", None, 2)]
                inner = helper.make_graph([_clone_of_one_branch(each)], "branch", [], outputs)
            branch = helper.make_node("If", ["yes"], ["e"], then_branch=inner, else_branch=inner)
            made = model([_clone_of_one_branch(branch), matmul("e")], [WEIGHTS, *_LOOP_CONSTANTS])
            write(folder, made)

        return written

    deep = "in each other more than|is no ONNX model"
    yield Hostile("20 graphs in each other", deep, nested(20))
    yield Hostile("2,000 graphs in each other", deep, _deep_by_hand(2_000))

    def many(folder: Path) -> None:
        made = model([step("Neg", "x", "a"), matmul()])
        made.graph.node.extend(made.graph.node[0] for _ in range(250_000))
        write(folder, made)

    yield Hostile("250,000 nodes", "more than 200000 nodes", many)

    local = {"": 17, "local": 1}
    recursive = nodes(
        step("Again", "x", "same", "local"),
        matmul("same"),
        opsets=local,
        functions=[_function("Again", [step("Again", "i", "o", "local")])],
    )
    yield Hostile("a function that calls itself", "calls itself", recursive)
    laughs = [
        _function(
            f"L{at}",
            [
                step(f"L{at + 1}", "i", "m1", "local"),
                step(f"L{at + 1}", "m1", "m2", "local"),
                step(f"L{at + 1}", "m2", "m3", "local"),
                step(f"L{at + 1}", "m3", "o", "local"),
            ],
        )
        for at in range(13)
    ]
    laughs.append(_function("L13", [step("Neg", "i", "o")]))
    billion = nodes(
        step("L0", "x", "same", "local"), matmul("same"), opsets=local, functions=laughs
    )
    yield Hostile("67 million nodes of functions", "more than 200000 nodes", billion)
    twice = [_function("F", [step("Neg", "i", "o")]) for _ in range(2)]
    same = nodes(step("F", "x", "s", "local"), matmul("s"), opsets=local, functions=twice)
    yield Hostile("a function twice", "the function 'F' twice", same)
    redefined = nodes(
        step("Neg", "x", "same"),
        matmul("same"),
        functions=[_function("Neg", [step("Identity", "i", "o")], domain="")],
    )
    yield Hostile("an operator of its own", "the operator 'Neg', which exists", redefined)
    unknown = nodes(
        step("F", "x", "same", "local"),
        matmul("same"),
        opsets=local,
        functions=[_function("F", [step("Evil", "i", "o", "com.example")])],
    )
    yield Hostile("a domain of its own in a function", "domain 'com.example'", unknown)

    def no_text(folder: Path) -> None:
        whole = model([matmul("QQQQ")], inputs=[floats("QQQQ", "rows", 2)]).SerializeToString()
        (folder / MODEL_FILE).write_bytes(whole.replace(b"QQQQ", b"\xff\xfe\xc0\x80"))

    yield Hostile("names that are no UTF-8", "cannot be printed|no ONNX model", no_text)
    clears = 'x\x1b[2J\r\n{"level": "info"}'
    control = nodes(matmul(clears), inputs=[floats(clears, "rows", 2)])
    yield Hostile("an input that clears the screen", "cannot be printed", control)
    long = "x" * 100_000
    lengthy = nodes(matmul(long), inputs=[floats(long, "rows", 2)])
    yield Hostile("a name of 100 kB", "longer than 256 characters", lengthy)

    def attribute(folder: Path) -> None:
        """Of a kind that its type denies."""
        wrong = helper.make_node("Softmax", ["x"], ["same"])
        wrong.attribute.append(AttributeProto(name="axis", type=AttributeProto.GRAPH, i=1))
        write(folder, model([wrong, matmul("same")]))

    yield Hostile("an attribute of another kind", cannot, attribute)

    def typeless(folder: Path) -> None:
        nested_type = TypeProto()
        inner = nested_type
        for _ in range(40):
            inner = inner.sequence_type.elem_type
        inner.tensor_type.elem_type = _FLOAT
        made = model([matmul()])
        made.graph.input[0].type.CopyFrom(nested_type)
        write(folder, made)

    yield Hostile("a sequence of sequences", f"{cannot}|cannot be served|killed by", typeless)


def _clone_of_one_branch(node: NodeProto) -> NodeProto:
    """With a leaf as the other branch: else each level would double the file."""
    leaf = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["e"])], "leaf", [], [floats("e", None, 2)]
    )
    node.attribute[1].g.CopyFrom(leaf)
    return node


def _deep_by_hand(depth: int) -> Callable[[Path], None]:
    """Bytes of a graph in a graph in a graph …, which the library itself refuses to write."""

    def message(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 0x7F:
            length += bytes([size & 0x7F | 0x80])
            size >>= 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    def written(folder: Path) -> None:
        graph_bytes = b""
        for _ in range(depth):
            attribute_bytes = message(1, b"g") + message(6, graph_bytes)
            graph_bytes = message(1, message(4, b"If") + message(5, attribute_bytes))
        head = ModelProto(ir_version=9).SerializeToString()
        (folder / MODEL_FILE).write_bytes(head + message(7, graph_bytes))

    return written


def _signatures() -> Iterator[Hostile]:
    def served(
        x: ValueInfoProto, y: ValueInfoProto, *nodes: NodeProto, weights: Any = np.float32
    ) -> Callable[[Path], None]:
        initializers = [tensor("weights", [[1], [2]], weights)]
        return lambda folder: write(folder, model(nodes, initializers, inputs=[x], outputs=[y]))

    other = "signature is not the manifest's"
    x, y = floats("x", "rows", 2), floats("y", "rows", 1)
    renamed = served(floats("z", "rows", 2), y, matmul("z"))
    yield Hostile("a renamed input", other, renamed)
    doubles = [
        helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["rows", width])
        for name, width in (("x", 2), ("y", 1))
    ]
    yield Hostile("doubles", other, served(*doubles, matmul(), weights=np.float64))
    yield Hostile("more columns", other, served(floats("x", "rows", 3), y, *_first_of_three()))
    rank = [
        helper.make_node("Squeeze", ["x"], ["flat"]),
        matmul("flat"),
    ]
    yield Hostile("another rank", other, served(floats("x", "rows", 1, 2), floats("y", 1), *rank))
    yield Hostile(
        "a renamed output",
        r"has no output \['y'\]",
        served(x, floats("z", "rows", 1), matmul(y="z")),
    )
    wider = [matmul(y="one"), helper.make_node("Concat", ["one", "one"], ["y"], axis=1)]
    yield Hostile("a wider output", other, served(x, floats("y", "rows", 2), *wider))
    boolean = helper.make_tensor_value_info("y", TensorProto.BOOL, ["rows", 1])
    decided = [matmul(y="number"), helper.make_node("Cast", ["number"], ["y"], to=TensorProto.BOOL)]
    yield Hostile("an output of another type", other, served(x, boolean, *decided))
    right = served(x, y, matmul())
    for name, lie, reason in (
        ("a manifest with another input", {"name": "z", "dtype": "float32", "shape": [2]}, "'z'"),
        ("a manifest with doubles", {"name": "x", "dtype": "float64", "shape": [2]}, "float64"),
        ("a manifest that is no signature", {"name": "x", "shape": "wide"}, "signature"),
    ):
        yield Hostile(name, reason, right, signature={**_SIGNATURE, "inputs": [lie]})
    fewer = {**_SIGNATURE, "outputs": []}
    yield Hostile("a manifest without outputs", "has no output 'y'", right, signature=fewer)

    def second(folder: Path) -> None:
        nodes = [helper.make_node("Add", ["x", "x2"], ["both"]), matmul("both")]
        write(folder, model(nodes, inputs=[x, floats("x2", "rows", 2)]))

    yield Hostile("one more input", other, second)


def _first_of_three() -> list[NodeProto]:
    split = helper.make_node("Split", ["x"], ["first", "middle", "last"], axis=1, num_outputs=3)
    # Of opset 17, which does not know the number.
    del split.attribute[-1]
    pair = helper.make_node("Concat", ["first", "middle"], ["pair"], axis=1)
    return [split, pair, matmul("pair")]


def _wrong_answers() -> Iterator[Hostile]:
    def after(*nodes: NodeProto, **constants: Any) -> Callable[[Path], None]:
        """`good` is right; these make `y` of it."""
        given = [numpy_helper.from_array(_number(value), name) for name, value in constants.items()]
        made = model([matmul(y="good"), *nodes], [WEIGHTS, *given])
        return lambda folder: write(folder, made)

    def node(operator: str, inputs: str, output: str = "y", **attributes: Any) -> NodeProto:
        return helper.make_node(operator, inputs.split(), [output], **attributes)

    no_number = "no finite number"
    yield Hostile("NaN", no_number, after(node("Add", "good nan"), nan=float("nan")))
    yield Hostile("infinity", no_number, after(node("Add", "good inf"), inf=float("inf")))
    beside = "must not depend on the rows beside it"
    mean = [
        node("ReduceMean", "good", "mean", axes=[0]),
        node("Sub", "mean known", "off"),
        node("Add", "good off"),
    ]
    known = sum(a + 2 * b for a, b in _GOLDEN) / len(_GOLDEN)
    yield Hostile("the mean of the batch", beside, after(*mean, known=known))
    places = [
        node("CumSum", "good axis", "sums"),
        node("CumSum", "good axis", "before", exclusive=1),
        node("Mul", "before tiny", "leak"),
        node("Sub", "sums before", "same"),
        node("Add", "same leak"),
    ]
    leaking = after(*places, axis=0, tiny=0.01)
    yield Hostile("the sum of those before, hidden", "training said|depend on the rows", leaking)
    first = [
        node("Slice", "good zero one", "first"),
        node("Sub", "first known", "off"),
        node("Add", "good off"),
    ]
    of_first = after(*first, zero=[0], one=[1], known=4.0)
    yield Hostile("the first row of the batch", beside, of_first)
    count = [
        node("Shape", "good", "shape"),
        node("Gather", "shape zero", "count"),
        node("Cast", "count", "rows", to=_FLOAT),
        node("Sub", "rows three", "off"),
        node("Add", "good off"),
    ]
    yield Hostile("the number of rows", beside, after(*count, zero=[0], three=3.0))
    one = after(node("ReduceMean", "good", axes=[0], keepdims=1))
    yield Hostile("one row for all", "the model answers otherwise", one)
    repeated = after(node("Concat", "good good", axis=0))
    yield Hostile("two rows for one", "the model answers otherwise", repeated)
    many = [node("Tile", "good by", "y")]
    huge = after(*many, by=[20_000_000, 1])
    yield Hostile("20 million rows for one", "answers otherwise|alloc|memory|killed", huge)
    off = after(node("Add", "good more"), more=0.001)
    yield Hostile("a thousandth off", "golden row 0: value is .*training said", off)
    gathered = after(node("Gather", "good far", "one"), node("Add", "good one"), far=[1_000_000])
    yield Hostile("a row that is not there", "golden rows", gathered)
    # It counts the rows that it ever saw? No operator of ONNX can; but it can throw a die.
    dice = [
        node("RandomUniformLike", "good", "die", low=-1.0, high=1.0),
        node("Add", "good die"),
    ]
    yield Hostile("a die", "training said", after(*dice))


def _crashes() -> Iterator[Hostile]:
    """What takes ONNX Runtime 1.31 down, and the process that executes it."""

    def beside(crash: NodeProto, **constants: NDArray[Any]) -> Callable[[Path], None]:
        given = [numpy_helper.from_array(value, name) for name, value in constants.items()]
        made = model([crash, matmul()], [WEIGHTS, *given], outputs=[*_OUTPUTS_WITH_A_CRASH])
        return lambda folder: write(folder, made)

    killed = "killed by SIG(FPE|ABRT|SEGV)"
    least = np.array([-1 << 63], np.int64)
    divided = helper.make_node("Div", ["least", "minus_one"], ["crash"])
    by_minus_one = beside(divided, least=least, minus_one=np.array([-1], np.int64))
    yield Hostile("the least number divided by -1", killed, by_minus_one)
    between = helper.make_node("RandomUniform", [], ["crash"], shape=[3], low=1e30)
    yield Hostile("a random number above 1e30 and below 1", killed, beside(between))
    scaled = helper.make_node("RandomNormal", [], ["crash"], shape=[3], scale=-1.0)
    yield Hostile("a negative deviation", killed, beside(scaled))


_OUTPUTS_WITH_A_CRASH = (floats("y", "rows", 1), helper.make_empty_tensor_value_info("crash"))
