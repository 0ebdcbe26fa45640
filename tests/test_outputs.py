import numpy as np
import pytest

from app.contract import Decision, Output
from app.errors import InvalidModel
from app.outputs import NotFinite, OutputReader
from app.tensors import Signature, TensorSpec

SIGNATURE = Signature(
    (),
    (
        TensorSpec("probabilities", "float32", (3,)),
        TensorSpec("minutes", "float32", (1,)),
        TensorSpec("flat", "float32", ()),
        TensorSpec("names", "str", (1,)),
        TensorSpec("cube", "float32", (2, 2)),
    ),
)
TENSORS = {
    "probabilities": np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]], np.float32),
    "minutes": np.array([[14.5], [15.0]], np.float32),
    "flat": np.array([1.0, 2.0], np.float32),
}


def test_one_column_of_a_binary_model() -> None:
    reader = OutputReader(
        {"probability": Output(tensor="probabilities", column=2)},
        Decision(output="probability", at_least=0.75),
        SIGNATURE,
    )
    read = reader.read(TENSORS)
    assert read.predictions == [
        {"probability": 0.25, "decision": False},
        {"probability": 0.75, "decision": True},
    ]
    assert read.distributions == {"probability": [0.25, 0.75]}
    assert read.not_finite == {}


@pytest.mark.parametrize("tensor", ["minutes", "flat"])
def test_a_regression_with_and_without_its_own_axis(tensor: str) -> None:
    reader = OutputReader({"value": Output(tensor=tensor)}, None, SIGNATURE)
    predictions = reader.read(TENSORS).predictions
    assert [set(prediction) for prediction in predictions] == [{"value"}, {"value"}]
    assert [p["value"] for p in predictions] == TENSORS[tensor].ravel().tolist()


def test_a_regression_decides_by_its_threshold() -> None:
    decision = Decision(output="delay", at_least=15)
    reader = OutputReader({"delay": Output(tensor="minutes")}, decision, SIGNATURE)
    assert [p["decision"] for p in reader.read(TENSORS).predictions] == [False, True]


def test_labelled_numbers_decide_for_the_largest() -> None:
    output = Output(tensor="probabilities", labels=("none", "some", "long"))
    reader = OutputReader({"delay": output}, Decision(output="delay"), SIGNATURE)
    read = reader.read(TENSORS)
    assert read.predictions[0] == {
        "delay": {"none": 0.5, "some": 0.25, "long": 0.25},
        "decision": "none",
    }
    assert read.predictions[1]["decision"] == "long"
    assert read.distributions == {"delay": [0.5, 0.75]}


def test_labelled_numbers_decide_for_nothing_below_the_threshold() -> None:
    output = Output(tensor="probabilities", labels=("none", "some", "long"))
    reader = OutputReader({"delay": output}, Decision(output="delay", at_least=0.6), SIGNATURE)
    assert [p["decision"] for p in reader.read(TENSORS).predictions] == [None, "long"]


def test_several_outputs_stand_side_by_side() -> None:
    reader = OutputReader(
        {"late": Output(tensor="probabilities", column=2), "delay": Output(tensor="minutes")},
        None,
        SIGNATURE,
    )
    assert reader.read(TENSORS).predictions[1] == {"late": 0.75, "delay": 15.0}


NOT_FINITE = pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])


@NOT_FINITE
def test_a_value_that_is_not_finite_is_refused_by_output_and_instance(value: float) -> None:
    reader = OutputReader({"delay": Output(tensor="minutes")}, None, SIGNATURE)
    with pytest.raises(NotFinite, match=r"'delay' of instances\[1\], instances\[3\]$") as refused:
        reader.read({"minutes": np.array([[1], [value], [2], [value]], np.float32)})
    assert refused.value.rows == {"delay": [1, 3]}


def test_of_many_refused_instances_the_first_are_named() -> None:
    reader = OutputReader({"delay": Output(tensor="flat")}, None, SIGNATURE)
    with pytest.raises(NotFinite, match=r"instances\[9\] and 190 more$"):
        reader.read({"flat": np.full(200, np.nan, np.float32)})


@NOT_FINITE
def test_null_stands_for_exactly_the_values_that_are_not_finite(value: float) -> None:
    reader = OutputReader(
        {
            "delay": Output(tensor="minutes", when_not_finite="null"),
            "late": Output(tensor="flat"),
        },
        Decision(output="delay", at_least=2),
        SIGNATURE,
    )
    read = reader.read(
        {
            "minutes": np.array([[1], [value], [3]], np.float32),
            "flat": np.array([0, 0.5, 1], np.float32),
        }
    )
    assert read.predictions == [
        {"delay": 1.0, "late": 0.0, "decision": False},
        {"delay": None, "late": 0.5, "decision": None},
        {"delay": 3.0, "late": 1.0, "decision": True},
    ]
    assert read.not_finite == {"delay": [1]}
    assert read.distributions == {"delay": [1.0, 3.0], "late": [0.0, 0.5, 1.0]}


def test_what_is_refused_is_refused_beside_what_is_null() -> None:
    reader = OutputReader(
        {
            "delay": Output(tensor="minutes", when_not_finite="null"),
            "late": Output(tensor="flat"),
        },
        None,
        SIGNATURE,
    )
    nothing = np.array([np.nan], np.float32)
    with pytest.raises(NotFinite) as refused:
        reader.read({"minutes": nothing.reshape(1, 1), "flat": nothing})
    assert refused.value.rows == {"late": [0]}


@NOT_FINITE
def test_labelled_numbers_are_null_together(value: float) -> None:
    output = Output(tensor="probabilities", labels=("a", "b", "c"), when_not_finite="null")
    reader = OutputReader({"class": output}, Decision(output="class"), SIGNATURE)
    read = reader.read({"probabilities": np.array([[0.5, value, 0.25], [0, 1, 0]], np.float32)})
    assert read.predictions == [
        {"class": None, "decision": None},
        {"class": {"a": 0.0, "b": 1.0, "c": 0.0}, "decision": "b"},
    ]
    assert read.not_finite == {"class": [0]}
    assert read.distributions == {"class": [1.0]}


@pytest.mark.parametrize(
    "output",
    [
        Output(tensor="absent"),
        Output(tensor="probabilities"),
        Output(tensor="probabilities", column=3),
        Output(tensor="probabilities", labels=("a", "b")),
        Output(tensor="names"),
        Output(tensor="cube"),
    ],
)
def test_an_output_that_the_model_does_not_have_is_refused(output: Output) -> None:
    with pytest.raises(InvalidModel, match=r"outputs\.y"):
        OutputReader({"y": output}, None, SIGNATURE)


NOT_ALL_FINITE = {
    "probabilities": np.array(
        [[0.5, 0.25, 0.25], [0.25, np.nan, 0.75], [0.25, 0.375, 0.375]], np.float32
    ),
    "flat": np.array([1.0, np.inf, 3.0], np.float32),
}


@pytest.mark.parametrize(
    ("output", "decision", "numbers", "decisions"),
    [
        (Output(tensor="flat"), 2, [1, np.inf, 3], [0, -1, 1]),
        (Output(tensor="flat"), None, [1, np.inf, 3], [-1, -1, -1]),
        (Output(tensor="probabilities", column=1), 0.3, [0.25, np.nan, 0.375], [0, -1, 1]),
        (
            Output(tensor="probabilities", labels=("a", "b", "c")),
            0.4,
            [[0.5, 0.25, 0.25], [0.25, np.nan, 0.75], [0.25, 0.375, 0.375]],
            [0, -1, -1],
        ),
    ],
)
def test_numbers_and_decisions_as_arrays(
    output: Output, decision: float | None, numbers: object, decisions: list[int]
) -> None:
    decide = None if decision is None else Decision(output="out", at_least=decision)
    reader = OutputReader({"out": output}, decide, SIGNATURE)
    np.testing.assert_array_equal(reader.numbers("out", NOT_ALL_FINITE), numbers)
    assert reader.decisions(NOT_ALL_FINITE).tolist() == decisions


def test_of_labels_that_say_the_same_the_first_decides_in_both_forms() -> None:
    output = Output(tensor="probabilities", labels=("a", "b", "c"))
    reader = OutputReader({"out": output}, Decision(output="out"), SIGNATURE)
    tensors = {"probabilities": np.array([[0.25, 0.375, 0.375]], np.float32)}
    assert reader.decisions(tensors).tolist() == [1]
    assert reader.read(tensors).predictions[0]["decision"] == "b"
