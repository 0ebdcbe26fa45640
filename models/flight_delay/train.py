"""Trains flight_delay: point-in-time features from Feast, gradient boosting, one ONNX file.

    python models/flight_delay/train.py --output FOLDER [--until 2013-09-01 | --like MANIFEST.json]

Writes model.onnx and training.json, which `hikyaku publish` takes. The same inputs give the same
file: nothing is drawn at random, and the number of threads changes nothing. `--like` takes the data
window and the hyperparameters of a published version: `hikyaku reproduce` asks for it.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from app.contract import Contract, load_contract
from app.errors import HikyakuError
from app.features.encoding import Encoder
from app.features.feast_plan import compile_plan
from app.features.feast_repo import offline_files, open_store, point_in_time
from app.repository.manifest import parse_manifest
from app.repository.origin import RunRecord

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FEATURE_REPO = ROOT / "feature_repo"

BOOSTING = {
    "max_iter": 200,
    "learning_rate": 0.06,
    "max_leaf_nodes": 31,
    "min_samples_leaf": 100,
    "l2_regularization": 1.0,
    "early_stopping": False,
    "random_state": 2013,
}
HYPERPARAMETERS = BOOSTING | {
    # How many average flights a category's own share of late flights is weighed against.
    "category_prior_flights": 50,
    "held_out_every": 5,
}
GOLDEN_ROWS = 32


def main() -> None:
    arguments = _arguments()
    contract = load_contract(HERE / "model.yaml")
    if contract.replay is None or contract.feature_service is None:
        sys.exit("model.yaml needs `replay` and `feature_service`: they name the training data")
    plan = compile_plan(open_store(FEATURE_REPO, None), contract.feature_service)
    sources = [column.source for column in contract.columns() if ":" in column.source]
    unknown = sorted(set(sources) - set(plan.references))
    if unknown:  # better told now than after the join
        sys.exit(f"model.yaml: inputs: the feature service has no {', '.join(unknown)}")
    flights = _labelled_flights(contract)
    hyperparameters, in_window = _asked_for(arguments, flights["request_time"])
    record = _record(contract, hyperparameters)
    train = flights[in_window]
    later = flights[flights["request_time"] > train["request_time"].max()]
    held_out = later.iloc[:: hyperparameters["held_out_every"]]
    if train.empty or held_out.empty:
        sys.exit("no flights to train on, or none after them to be measured by")

    categories = _late_shares(train, contract, hyperparameters["category_prior_flights"])
    encoder = Encoder(contract.inputs, categories)
    train_rows, train_features = _encoded(train, encoder, contract)
    held_out_rows, held_out_features = _encoded(held_out, encoder, contract)

    boosting = {name: hyperparameters[name] for name in BOOSTING}
    model = _fitted(boosting, train_rows, train["late"])
    metrics = _metrics(model, held_out_rows, held_out["late"])
    request_time = [i for i, c in enumerate(contract.columns()) if ":" not in c.source]
    without = _fitted(boosting, train_rows[:, request_time], train["late"])
    metrics["auc_without_online_features"] = float(
        roc_auc_score(held_out["late"], _late(without, held_out_rows[:, request_time]))
    )
    _say("held out: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "model.onnx").write_bytes(_onnx(model, train_rows.shape[1]))
    document = {
        "categories": categories,
        "means": _means(train_features),
        "golden": _golden(model, held_out, held_out_rows, held_out_features, contract),
        "metrics": metrics,
        "data_window": {
            "start": train["request_time"].min().isoformat(),
            "end": train["request_time"].max().isoformat(),
            "rows": len(train),
        },
        "hyperparameters": hyperparameters,
        "run": record.finished().model_dump(mode="json"),
    }
    (arguments.output / "training.json").write_text(json.dumps(document, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--until", default="2013-09-01", help="train on requests before this day")
    chosen.add_argument("--like", type=Path, metavar="MANIFEST.json", help="train this one again")
    return parser.parse_args()


def _asked_for(
    arguments: argparse.Namespace, asked_at: "pd.Series[pd.Timestamp]"
) -> tuple[Mapping[str, Any], "pd.Series[bool]"]:
    """The hyperparameters, and which flights to train on by their instants of asking."""
    if arguments.like is None:
        until = pd.Timestamp(arguments.until, tz="America/New_York")
        return HYPERPARAMETERS, asked_at < until
    like = parse_manifest(arguments.like.read_bytes(), str(arguments.like)).training
    other = HYPERPARAMETERS.keys() ^ like.hyperparameters.keys()
    if other:
        sys.exit(f"{arguments.like}: not the hyperparameters used here: {', '.join(sorted(other))}")
    window = [pd.Timestamp(instant) for instant in (like.data_window.start, like.data_window.end)]
    return like.hyperparameters, asked_at.between(*window)


def _record(contract: Contract, hyperparameters: Mapping[str, Any]) -> RunRecord:
    """What this training is made from, for the version's lineage."""
    return RunRecord(
        HERE,
        FEATURE_REPO,
        data=[
            HERE / contract.replay.requests,
            FEATURE_REPO / "data" / "history.json",
            *offline_files(open_store(FEATURE_REPO, None), contract.feature_service),
        ],
        seeds={"random_state": hyperparameters["random_state"]},
        lock=ROOT / "requirements" / "train.txt",
    )


def _labelled_flights(contract: Contract) -> pd.DataFrame:
    flights = pd.read_parquet(HERE / contract.replay.requests)
    flights = flights[flights["late"].notna()].reset_index(drop=True)
    return flights.assign(late=flights["late"].astype(bool))


def _late_shares(
    train: pd.DataFrame, contract: Contract, prior: float
) -> dict[str, dict[str, float]]:
    """For each category its share of late flights, drawn towards the average of all."""
    average = train["late"].mean()
    shares = {}
    for source in [c.source for c in contract.columns() if c.transform == "category"]:
        late = train.groupby(source)["late"].agg(["sum", "size"])
        share = (late["sum"] + average * prior) / (late["size"] + prior)
        shares[source] = {str(name): float(value) for name, value in share.items()}
    return shares


def _encoded(
    flights: pd.DataFrame, encoder: Encoder, contract: Contract
) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
    """The rows as the model sees them, and the stored features that went into them."""
    started = time.monotonic()
    features = point_in_time(
        open_store(FEATURE_REPO, None),
        contract.feature_service,
        flights[["request_time", "carrier", "origin", "dest", "tailnum"]],
        "request_time",
        say=_say,
    )
    _say(f"features of {len(flights):,} flights as known then: {time.monotonic() - started:.0f} s")
    fields = {
        "scheduled_departure": [datetime.fromisoformat(t) for t in flights["scheduled_departure"]],
        **{name: flights[name].to_numpy() for name in ("carrier", "origin", "dest", "distance")},
    }
    return encoder.encode({**fields, **features}, len(flights))["features"], features


def _means(features: dict[str, NDArray[Any]]) -> dict[str, float]:
    """Of each stored number that was ever there: model.yaml may put it in a missing one's place."""
    return {
        name: float(np.nanmean(values))
        for name, values in features.items()
        if values.dtype != object and not np.isnan(values).all()
    }


def _fitted(
    boosting: dict[str, Any], rows: NDArray[np.float32], late: "pd.Series[bool]"
) -> HistGradientBoostingClassifier:
    started = time.monotonic()
    model = HistGradientBoostingClassifier(**boosting).fit(rows, late)
    _say(f"trained on {len(rows):,} x {rows.shape[1]}: {time.monotonic() - started:.0f} s")
    return model


def _late(model: HistGradientBoostingClassifier, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    return model.predict_proba(rows)[:, 1]


def _metrics(
    model: HistGradientBoostingClassifier, rows: NDArray[np.float32], late: "pd.Series[bool]"
) -> dict[str, float]:
    probability = _late(model, rows)
    return {
        "auc": float(roc_auc_score(late, probability)),
        "log_loss": float(log_loss(late, probability)),
        "brier": float(brier_score_loss(late, probability)),
        "late_share": float(late.mean()),
        "rows": len(late),
    }


def _onnx(model: HistGradientBoostingClassifier, width: int) -> bytes:
    with warnings.catch_warnings():
        # skl2onnx 1.20 writes booleans where protobuf 7 will want integers.
        warnings.simplefilter("ignore", DeprecationWarning)
        return to_onnx(
            model,
            initial_types=[("features", FloatTensorType([None, width]))],
            options={id(model): {"zipmap": False}},
            target_opset={"": 17, "ai.onnx.ml": 3},
        ).SerializeToString()


def _golden(
    model: HistGradientBoostingClassifier,
    flights: pd.DataFrame,
    rows: NDArray[np.float32],
    features: dict[str, NDArray[Any]],
    contract: Contract,
) -> dict[str, Any]:
    """Held-out flights of all months, with what the model says of them. The first one is the last
    that was asked for while the history was whole: it shows what an answer looks like."""
    end = pd.Timestamp(json.loads((FEATURE_REPO / "data" / "history.json").read_text())["end"])
    last = int((flights["request_time"] <= end).sum()) - 1
    chosen = np.linspace(last, 0, GOLDEN_ROWS).astype(int)
    fields = ["carrier", "origin", "dest", "tailnum", *contract.request_fields]
    instances = flights.iloc[chosen][fields].to_dict("records")
    for instance in instances:
        instance["tailnum"] = instance["tailnum"] if pd.notna(instance["tailnum"]) else None
    return {
        "instances": instances,
        "features": {
            name: [None if np.isnan(value) else float(value) for value in values[chosen]]
            for name, values in features.items()
        },
        "predictions": [{"probability": float(p)} for p in _late(model, rows[chosen])],
    }


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except HikyakuError as exc:
        sys.exit(str(exc))
