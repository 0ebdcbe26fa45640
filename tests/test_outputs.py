import numpy as np
import pytest

from app.contract import Decision, Output
from app.errors import BackendError, InvalidModel
from app.outputs import OutputReader
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
    predictions, distributions = reader.read(TENSORS)
    assert predictions == [
        {"probability": 0.25, "decision": False},
        {"probability": 0.75, "decision": True},
    ]
    assert distributions["probability"].tolist() == [0.25, 0.75]


@pytest.mark.parametrize("tensor", ["minutes", "flat"])
def test_a_regression_with_and_without_its_own_axis(tensor: str) -> None:
    reader = OutputReader({"value": Output(tensor=tensor)}, None, SIGNATURE)
    predictions, _ = reader.read(TENSORS)
    assert [set(prediction) for prediction in predictions] == [{"value"}, {"value"}]
    assert [p["value"] for p in predictions] == TENSORS[tensor].ravel().tolist()


def test_a_regression_decides_by_its_threshold() -> None:
    decision = Decision(output="delay", at_least=15)
    reader = OutputReader({"delay": Output(tensor="minutes")}, decision, SIGNATURE)
    assert [p["decision"] for p in reader.read(TENSORS)[0]] == [False, True]


def test_labelled_numbers_decide_for_the_largest() -> None:
    output = Output(tensor="probabilities", labels=("none", "some", "long"))
    reader = OutputReader({"delay": output}, Decision(output="delay"), SIGNATURE)
    predictions, distributions = reader.read(TENSORS)
    assert predictions[0] == {
        "delay": {"none": 0.5, "some": 0.25, "long": 0.25},
        "decision": "none",
    }
    assert predictions[1]["decision"] == "long"
    assert distributions["delay"].tolist() == [0.5, 0.75]


def test_labelled_numbers_decide_for_nothing_below_the_threshold() -> None:
    output = Output(tensor="probabilities", labels=("none", "some", "long"))
    reader = OutputReader({"delay": output}, Decision(output="delay", at_least=0.6), SIGNATURE)
    assert [p["decision"] for p in reader.read(TENSORS)[0]] == [None, "long"]


def test_several_outputs_stand_side_by_side() -> None:
    reader = OutputReader(
        {"late": Output(tensor="probabilities", column=2), "delay": Output(tensor="minutes")},
        None,
        SIGNATURE,
    )
    assert reader.read(TENSORS)[0][1] == {"late": 0.75, "delay": 15.0}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_never_an_answer(value: float) -> None:
    reader = OutputReader({"delay": Output(tensor="minutes")}, None, SIGNATURE)
    with pytest.raises(BackendError, match="'delay'"):
        reader.read({"minutes": np.array([[1.0], [value]], np.float32)})


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
