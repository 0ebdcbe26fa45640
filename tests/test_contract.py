from pathlib import Path

import pytest
import yaml

from app.contract import load_contract, parse_contract
from app.errors import InvalidModel

MODELS = Path(__file__).parent.parent / "models"
VALID = {
    "request_fields": {"a": "float"},
    "inputs": [{"tensor": "x", "columns": ["a"]}],
    "outputs": {"y": {"tensor": "y"}},
}


def missing(**policy: object) -> dict[str, object]:
    return {"features": {"missing": {"v:f": policy}}}


def written(folder: Path, document: object) -> Path:
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/model.yaml")), ids=str)
def test_the_contracts_that_ship_are_valid(path: Path) -> None:
    assert load_contract(path).outputs


def test_a_column_may_be_written_short(tmp_path: Path) -> None:
    column = load_contract(written(tmp_path, VALID)).columns()[0]
    assert (column.source, column.transform) == ("a", "number")


def test_a_policy_may_be_written_as_yaml_writes_null(tmp_path: Path) -> None:
    path = written(tmp_path, VALID)
    path.write_text(path.read_text() + "features: {missing: {'v:f': {use: null}}}")
    assert load_contract(path).features.missing["v:f"].use == "null"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ouputs": {}}, "ouputs"),
        ({"request_fields": {"a": "number"}}, "request_fields.a"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{"tensor": "x", "columns": []}]}, "inputs.0.columns"),
        ({"inputs": [{"tensor": "x", "columns": [{"from": "a", "as": "log"}]}]}, "as"),
        ({"outputs": {"y": {"tensor": "y", "column": 0, "labels": ["a"]}}}, "outputs.y"),
        ({"decision": {"output": "z", "at_least": 1}}, "no output is named 'z'"),
        ({"decision": {"output": "y"}}, "at_least"),
        ({"batching": {"max_batch_rows": 0}}, "batching.max_batch_rows"),
        (
            {
                "batching": {"max_batch_rows": 65_536},
                "inputs": [{"tensor": "x", "columns": ["a"] * 1_025}],
            },
            "max_batch_rows: 65,536 rows of 1,025 inputs",
        ),
        ({"backend": {"use": "onnx", "providers": ["gpu"]}}, "backend.onnx.providers"),
        ({"backend": {"use": "onnx", "provider_options": {"rocm": {}}}}, "backend.onnx: Value"),
        (
            {"backend": {"use": "onnx", "memory_arena": False, "memory_pattern": True}},
            "backend.onnx: Value error, memory_pattern",
        ),
        (missing(use="constant"), "features.missing.v:f: Value error, `use: constant` needs"),
        (missing(use="constant", value=[1]), "features.missing.v:f.value"),
        (missing(use="constant", value=float("nan")), "features.missing.v:f.value"),
        (missing(use="last_good"), "features.missing.v:f: Value error, `use: last_good` needs"),
        (missing(use="last_good", max_age_s=0), "features.missing.v:f.max_age_s"),
        (missing(use="training_mean", value=1), "features.missing.v:f: Value error, `value`"),
        (missing(use="refuse", max_age_s=1), "features.missing.v:f: Value error, `max_age_s`"),
        (missing(use="guess"), "features.missing.v:f.use"),
        ({"features": {"last_good_entities": 0}}, "features.last_good_entities"),
        ({"batching": {"hold_ms": 1000}}, "batching.hold_ms"),
        ({"batching": {"max_queue_rows": 9}}, "batching.max_queue_rows"),
        ({"features": {"time_share": 1.0}}, "features.time_share"),
    ],
)
def test_a_fault_names_the_file_and_the_field(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    path = written(tmp_path, VALID | change)
    with pytest.raises(InvalidModel) as refused:
        load_contract(path)
    assert named in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"just a text", b""])
def test_what_is_no_contract_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidModel, match=r"model\.yaml"):
        load_contract(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"no/model\.yaml: no such file"):
        load_contract(tmp_path / "no" / "model.yaml")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("inputs: " + "[" * 50 + "]" * 50, "over 16 deep"),
        ("inputs: &a [*a]", "has aliases"),
        ("a: &a {b: 1}\nc: {<<: [*a, *a]}", "has aliases"),
        ("inputs: [" + "a," * 100_000 + "]", "more than 100,000"),
    ],
    ids=["deep", "in itself", "merged", "many"],
)
def test_a_document_that_would_keep_its_reader_busy_is_refused(content: str, reason: str) -> None:
    with pytest.raises(InvalidModel, match=reason):
        parse_contract(content.encode(), "model.yaml")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("limits: {}\ninputs: []\nlimits: {}", r"^model\.yaml: limits: is there twice$"),
        ("outputs: {y: {tensor: y, tensor: z}}", "tensor: is there twice"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(content: str, reason: str) -> None:
    with pytest.raises(InvalidModel, match=reason):
        parse_contract(content.encode(), "model.yaml")


def test_a_reason_is_one_short_line_however_much_is_wrong() -> None:
    names = [f"\x1b[31m{number}\n" for number in range(1_000)]
    document = yaml.safe_dump(VALID | dict.fromkeys(names, 1))
    with pytest.raises(InvalidModel, match="and 992 more") as refused:
        parse_contract(document.encode(), "model.yaml")
    assert len(str(refused.value)) < 1_000
    assert str(refused.value).isprintable()


def test_more_faults_than_anybody_reads_are_only_counted() -> None:
    document = yaml.safe_dump(VALID | dict.fromkeys(map(str, range(20_000)), 1))
    with pytest.raises(InvalidModel, match="20,000 faults"):
        parse_contract(document.encode(), "model.yaml")


def test_a_candidate_stays_behind_everybody_else_whatever_else_is_said_of_its_process() -> None:
    document = VALID | {"shadow": {"isolation": {"memory_mb": 2048}}}
    isolation = parse_contract(yaml.safe_dump(document).encode(), "model.yaml").shadow.isolation
    assert (isolation.memory_mb, isolation.nice, isolation.idle) == (2048, 19, True)
