"""The serving contract of a model: what model.yaml may say, with its defaults and its limits."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from app.errors import InvalidModel

# Fifty times as fast where PyYAML was built with libyaml: a model is loaded while others answer.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MOST_DEPTH = 16  # libyaml's loader takes the process down some thousands deep
_MOST_EVENTS = 100_000
_SHOWN_FAULTS = 8
_MOST_FAULTS = 10_000
_MOST_NUMBERS = 1 << 26  # of a batch, which the server holds: 256 MB of float32
_MOST_SHOWN = 200
MAX_SEGMENTS = 64
"""Of all the fields together, `other` included."""

FieldType: TypeAlias = Literal["string", "float", "int", "bool", "timestamp"]
Transform: TypeAlias = Literal["number", "category", "minute_of_day", "day_of_week", "text"]
Endpoint: TypeAlias = Annotated[
    str, Field(pattern=r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$")
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Column(_Section):
    """One column of an input tensor: the value `source` after the transform `as`.

    `source` is a stored feature (`view:feature`) or a field of the instance; `as` is executed by
    app/features/encoding.py, in training and in serving.
    """

    source: str = Field(alias="from")
    transform: Transform = Field(default="number", alias="as")

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        return {"from": value} if isinstance(value, str) else value


class InputTensor(_Section):
    """One input of the model: its columns, in order, make the tensor's second axis."""

    tensor: str
    dtype: Literal["float32", "float64", "int64", "str"] = "float32"
    columns: Annotated[tuple[Column, ...], Field(min_length=1)]


class Output(_Section):
    """One named value of a prediction.

    `column` picks one number of the tensor's second axis; `labels` names all of them, and the
    prediction then holds `{label: number}`. Without either the tensor has one number a row.
    `when_not_finite`: where the model returns NaN or infinity, `refuse` refuses the request and
    `null` answers null, as value and decision, and flags the answer.
    """

    tensor: str
    column: Annotated[int, Field(ge=0)] | None = None
    labels: tuple[str, ...] | None = None
    when_not_finite: Literal["refuse", "null"] = "refuse"

    @field_validator("when_not_finite", mode="before")
    @classmethod
    def _null_unquoted(cls, value: Any) -> Any:
        return "null" if value is None else value  # `null` is a null in YAML

    @model_validator(mode="after")
    def _one_reading(self) -> "Output":
        if self.column is not None and self.labels is not None:
            raise ValueError("give `column` or `labels`, not both")
        return self


class Decision(_Section):
    """What is decided from an output.

    A number: true when it is `at_least` the threshold. Labelled numbers: the label of the largest
    one, or null when even that is below `at_least`.
    """

    output: str
    at_least: float | None = None


class MissingValue(_Section):
    """What the model gets where a stored value is missing.

    `null`: what training saw. `constant`: the `value`, a number or, for a text, a text.
    `training_mean`: the mean of the training rows, from the manifest. `last_good`: the value that
    this process last read for the entity, while its own event time is at most `max_age_s` old by
    feature time, else the `value` where one is given. `refuse`: `features_unavailable`.

    `constant` and `training_mean` stand for a stored null too; `last_good` leaves it a null, and
    `refuse` refuses it.
    """

    use: Literal["null", "constant", "training_mean", "last_good", "refuse"]
    value: Annotated[float, Field(allow_inf_nan=False)] | str | None = None
    max_age_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @field_validator("use", mode="before")
    @classmethod
    def _null_unquoted(cls, value: Any) -> Any:
        return "null" if value is None else value  # `use: null` is a null in YAML

    @model_validator(mode="after")
    def _fits_its_policy(self) -> "MissingValue":
        if self.use == "constant" and self.value is None:
            raise ValueError("`use: constant` needs a `value`")
        if self.use == "last_good" and self.max_age_s is None:
            raise ValueError("`use: last_good` needs `max_age_s`")
        if self.value is not None and self.use not in {"constant", "last_good"}:
            raise ValueError("`value` belongs to `use: constant` and `use: last_good`")
        if self.max_age_s is not None and self.use != "last_good":
            raise ValueError("`max_age_s` belongs to `use: last_good`")
        return self


class Features(_Section):
    """How stored features are read. `time_share` of the request's time may go into the read.

    `when_unavailable: refuse` refuses a request of which any value could not be read. For `missing`
    with `last_good` each view keeps the values of the `last_good_entities` that were asked for last
    (docs/features.md says what that takes).
    """

    when_unavailable: Literal["answer", "refuse"] = "answer"
    time_share: Annotated[float, Field(gt=0, lt=1)] = 0.4
    missing: Mapping[str, MissingValue] = {}
    last_good_entities: Annotated[int, Field(ge=1, le=10_000_000)] = 10_000


class Isolation(_Section):
    """A process of its own for what executes: it crashes, hangs or leaks alone.

    It may allocate `memory_mb`, and is replaced when it has taken half of what a fresh one leaves.
    It gets `start_s` to open and warm the model, and an execution that nobody waits for any more
    gets `stuck_s` before the process is killed. Between starts after failures in a row there are
    pauses; an answer `proven_s` after a process was opened ends the row. `nice` puts its CPU time
    behind that of the server, and with `idle` it gets what all others leave (Linux).
    """

    memory_mb: Annotated[int, Field(ge=256)] = 1_024
    start_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60
    stuck_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1
    proven_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    idle: bool = False


class CandidateIsolation(Isolation):
    """Unless it says otherwise, behind everybody else, and seldom started where it dies often."""

    proven_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10
    nice: Annotated[int, Field(ge=0, le=19)] = 19
    idle: bool = True


class EchoOptions(_Section):
    """Answers each output with the input of the same position: for tests and floors."""

    use: Literal["echo"]
    isolated: Isolation | None = None


class OnnxOptions(_Section):
    """ONNX Runtime in the server's process; docs/backends.md says when to change what.

    `providers`: the first one that starts executes the model: `cuda`, `tensorrt`, `cpu`, or the
    full name of another (`OpenVINOExecutionProvider`). A list without `cpu` refuses to load where
    none of them starts. `provider_options` go to a provider as they are, by its name here.
    `instances`: executions at once, where one takes longer than the event loop can spare.
    `threads`: threads to a node of the graph; workers times instances times threads should not be
    more than there are cores. `parallel_nodes` above 1 executes so many branches at once.
    `spinning`: threads wait actively; for one worker with cores to spare. `memory_arena` keeps
    memory for the next execution, `memory_pattern` plans it for each size of batch and keeps that.
    `io_binding`: null binds inputs and outputs to the device where there is one.
    """

    use: Literal["onnx"]
    providers: Annotated[tuple[str, ...], Field(min_length=1)] = ("cuda", "cpu")
    provider_options: Mapping[str, Mapping[str, str | int | float | bool]] = {}
    instances: Annotated[int, Field(ge=1, le=64)] = 1
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    isolated: Isolation | None = None
    parallel_nodes: Annotated[int, Field(ge=1, le=256)] = 1
    spinning: bool = False
    memory_arena: bool = True
    memory_pattern: bool = False
    graph_optimisation: Literal["none", "basic", "extended", "all"] = "all"
    io_binding: bool | None = None

    @field_validator("providers")
    @classmethod
    def _names_of_providers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in {"cuda", "tensorrt", "cpu"} and not name.endswith("ExecutionProvider"):
                raise ValueError(f"{name!r}: cuda, tensorrt, cpu or the name of another provider")
        return value

    @model_validator(mode="after")
    def _options_of_those_providers(self) -> "OnnxOptions":
        unknown = self.provider_options.keys() - set(self.providers)
        if unknown:
            raise ValueError(f"provider_options: {sorted(unknown)} not among `providers`")
        return self

    @model_validator(mode="after")
    def _patterns_are_kept_in_the_arena(self) -> "OnnxOptions":
        if self.memory_pattern and not self.memory_arena:
            raise ValueError("memory_pattern: without memory_arena it holds a block for every size")
        return self


class TritonOptions(_Section):
    """A model on a Triton server. `endpoints` (`host:port`) are equal; up to `in_flight` executions
    are under way at each.

    `model` and `version` are those in Triton's repository, by default the published ones. When no
    endpoint answers the start waits for `start_timeout_s`. While none is there, `failover` executes
    the published file in the server's process.
    """

    use: Literal["triton"]
    endpoints: Annotated[tuple[Endpoint, ...], Field(min_length=1)]
    protocol: Literal["grpc", "http"] = "grpc"
    model: str | None = None
    version: Annotated[int, Field(ge=1)] | None = None
    in_flight: Annotated[int, Field(ge=1, le=1_024)] = 4
    start_timeout_s: Annotated[float, Field(ge=0, le=600)] = 10.0
    failover: OnnxOptions | None = None

    @field_validator("failover", mode="before")
    @classmethod
    def _failover_by_its_name(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value

    @field_validator("endpoints")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("an endpoint is named twice")
        return value


BackendOptions: TypeAlias = EchoOptions | OnnxOptions | TritonOptions


class Batching(_Section):
    """How rows share executions.

    `max_batch_rows` go into one at most, fewer where the warm-up finds that a row is cheaper then.
    `hold_ms` above 0 makes a batch wait for company; the default starts as soon as it can. Then a
    batch of the largest of `preferred_rows` (default: `max_batch_rows`) still starts at once, and
    the others take the largest of them that is there. `max_queue_rows` bounds the memory of waiting
    rows: what cannot be answered by its deadline is refused before. Where rows make batches fail,
    running parts of them again takes at most `isolation_share` of all executions.
    """

    max_batch_rows: Annotated[int, Field(ge=1, le=65_536)] = 64
    max_queue_rows: Annotated[int, Field(ge=1)] = 16_384
    hold_ms: Annotated[float, Field(ge=0, le=1_000)] = 0
    preferred_rows: tuple[Annotated[int, Field(ge=1)], ...] = ()
    isolation_share: Annotated[float, Field(gt=0, le=1)] = 0.05

    @model_validator(mode="after")
    def _preferred_sizes_can_be(self) -> "Batching":
        if self.preferred_rows and not self.hold_ms:
            raise ValueError("preferred_rows: has no effect without hold_ms")
        if max(self.preferred_rows, default=0) > self.max_batch_rows:
            raise ValueError("preferred_rows: above max_batch_rows")
        return self


class Segment(_Section):
    """Rows are told apart by the field `from` of their instance, by default that of the segment's
    name, after the transform `as`.

    `values`: one segment for each of these texts. `edges`: numbers below the first edge, from each
    edge to the next, from the last one on. What is none of them, a null say, is `other`.
    """

    source: str | None = Field(default=None, alias="from")
    transform: Transform = Field(default="number", alias="as")
    values: tuple[str, ...] | None = None
    edges: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "Segment":
        if (self.values is None) == (self.edges is None):
            raise ValueError("give `values` or `edges`, one of them")
        if not (self.values or self.edges):
            raise ValueError("needs at least one value or edge")
        if self.values is not None:
            if len(set(self.values)) < len(self.values):
                raise ValueError("a value is named twice")
            if self.transform not in {"number", "category", "text"}:
                raise ValueError(f"`as: {self.transform}` makes numbers: give `edges`")
        if self.edges is not None and sorted(set(self.edges)) != list(self.edges):
            raise ValueError("edges must grow")
        return self

    def names(self, name: str) -> tuple[str, ...]:
        """Of the segments, in order, `other` the last one."""
        if self.values is not None:
            parts = list(self.values)
        else:
            assert self.edges is not None
            ends = ["", *(f"{edge:g}" for edge in self.edges), ""]
            parts = [f"{low}..{high}" for low, high in pairwise(ends)]
        return tuple(f"{name}={part}" for part in (*parts, "other"))


class Shadow(_Section):
    """How candidates are shown what the champion answers (docs/shadow.md).

    `share` of the requests, drawn for each, or `by: routing_key` for each key. A candidate executes
    up to `block_rows` rows at once, gathered for `hold_ms`; what it has not answered after
    `timeout_ms` is dropped, and so are the oldest rows beyond `pending_rows`. The candidate is
    executed in a process of its own by `isolation`, unless a Triton executes it.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    by: Literal["request", "routing_key"] = "request"
    block_rows: Annotated[int, Field(ge=1, le=4_096)] = 32
    hold_ms: Annotated[float, Field(ge=0, le=1_000)] = 20
    timeout_ms: Annotated[float, Field(gt=0, le=60_000)] = 5_000
    pending_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 1_024
    isolation: CandidateIsolation = CandidateIsolation()

    @model_validator(mode="after")
    def _blocks_fit(self) -> "Shadow":
        if self.block_rows > self.pending_rows:
            raise ValueError("block_rows: above pending_rows")
        return self


class Margins(_Section):
    """So much more harm than the champion's counts as none.

    `errors`, `not_finite`, `flips`, `slow` and `median` are shares of answers; `shift` is in the
    unit of the score, up or down; `loss` is of the Brier loss. `not_finite: 0`: not a single row.
    """

    errors: Annotated[float, Field(gt=0, lt=1)] = 0.001
    not_finite: Annotated[float, Field(ge=0, lt=1)] = 0.0
    slow: Annotated[float, Field(gt=0, lt=1)] = 0.01
    median: Annotated[float, Field(gt=0, lt=1)] = 0.1
    flips: Annotated[float, Field(gt=0, lt=1)] = 0.01
    shift: Annotated[float, Field(gt=0, lt=1)] = 0.01
    loss: Annotated[float, Field(gt=0, lt=1)] = 0.002


class Release(_Section):
    """How a candidate comes to serve (docs/canary.md).

    `kind`: an `equivalent` version (exported anew, quantised) is to say the same, so that flips and
    a shift of the score decide too; a `retrain` is judged by errors, latency and its loss.
    `stages`: first `shadow`, then the percentage of the routing keys that the candidate answers, up
    to 100. Each lasts from `least_minutes` to `most_hours` and has `least_answers` of the
    candidate; what is not decided `at_the_end` is rolled back, or held. An answer is slow that
    takes longer than `slow_factor` times the 99th percentile of the champion's while the candidate
    is shown requests, and few more than before are to take longer than so many times its `median`.
    `hold_out` is the share of the keys that no candidate answers. After the last stage the version
    before goes on answering `control` of the keys for `watch_hours`: the new one is rolled back on
    the same evidence. `of_current`: whether a version that CURRENT comes to name is loaded, so that
    it answers everybody at once, or released by this plan.
    """

    kind: Literal["retrain", "equivalent"] = "retrain"
    stages: tuple[Literal["shadow"] | Annotated[float, Field(ge=0.1, le=100)], ...] = (
        "shadow",
        10.0,
        50.0,
        100.0,
    )
    margins: Margins = Margins()
    least_answers: Annotated[int, Field(ge=1)] = 1_000
    least_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1
    most_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 24
    at_the_end: Literal["rollback", "hold"] = "rollback"
    slow_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.2
    hold_out: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    control: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    watch_hours: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 24
    of_current: Literal["load", "release"] = "load"

    @model_validator(mode="after")
    def _stages_grow(self) -> "Release":
        first, *shares = self.stages or (None,)
        if first != "shadow" or "shadow" in shares:
            raise ValueError("stages: the first one, and no other, is `shadow`")
        numbers = [share for share in shares if not isinstance(share, str)]
        if sorted(set(numbers)) != numbers or numbers[-1:] != [100]:
            raise ValueError("stages: percentages that grow, up to 100")
        if self.control and not self.watch_hours:
            raise ValueError("control: has no effect without watch_hours")
        if 0 < self.control < 0.001:
            raise ValueError("control: 0, or at least 0.001")
        return self


class LabelHorizon(_Section):
    """When a label counts: so many seconds after the instant in the field `from` of the instance,
    or after the prediction; by feature time."""

    source: str | None = Field(default=None, alias="from")
    after_s: Annotated[float, Field(gt=0, le=366 * 86_400, allow_inf_nan=False)]


class Labels(_Section):
    """The truth, told later by `:feedback` (docs/labels.md).

    `kind` of the label: `binary` is true or false of an output that is a probability, `class` the
    name of a label of labelled outputs, `number` the value that the output predicts. The
    predictions of a `share` of the requests are kept in the state Redis until their `horizon`, in
    at most `max_megabytes`.
    """

    kind: Literal["binary", "class", "number"] = "binary"
    horizon: LabelHorizon
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_megabytes: Annotated[int, Field(ge=1, le=65_536)] = 64


class Limits(_Section):
    """What one request may ask for."""

    max_instances: Annotated[int, Field(ge=1)] = 10_000
    default_timeout_ms: Annotated[int, Field(ge=1)] = 1_000
    max_timeout_ms: Annotated[int, Field(ge=1)] = 30_000


class Replay(_Section):
    """A recorded request log for `hikyaku replay` and `evaluate`: a parquet file with one request a
    row.

    The path is relative to model.yaml. The other names are columns: the instant of asking, the
    truth (null where there is none), the instant at which the truth is known; every request field
    of the contract is a column too. Without `label_known_at` no labels are sent. Where there is no
    truth, `no_label_after_s` after asking it is said that there never will be one; None: never.
    """

    requests: str
    asked_at: str
    label: str
    label_known_at: str | None = None
    no_label_after_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Contract(_Section):
    """A model.yaml. Nothing in it depends on a published version."""

    description: str = ""
    backend: Annotated[BackendOptions, Field(discriminator="use")] = OnnxOptions(use="onnx")
    feature_service: str | None = None
    request_fields: Mapping[str, FieldType] = {}
    inputs: Annotated[tuple[InputTensor, ...], Field(min_length=1)]
    outputs: Annotated[Mapping[str, Output], Field(min_length=1)]
    decision: Decision | None = None
    features: Features = Features()
    batching: Batching = Batching()
    limits: Limits = Limits()
    routing_key: str | None = None
    """The field of an instance by which requests are routed that have no `Routing-Key`."""
    compared_output: str | None = None
    """Which output candidates are compared by; None is the one that decides, or else the first."""
    segments: Mapping[str, Segment] = {}
    shadow: Shadow = Shadow()
    release: Release = Release()
    labels: Labels | None = None
    replay: Replay | None = None

    @field_validator("backend", mode="before")
    @classmethod
    def _backend_by_its_name(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _limits_agree(self) -> "Contract":
        if self.batching.max_queue_rows < self.limits.max_instances:
            raise ValueError("batching.max_queue_rows: below limits.max_instances")
        if self.batching.hold_ms >= self.limits.default_timeout_ms:
            raise ValueError("batching.hold_ms: not below limits.default_timeout_ms")
        return self

    @model_validator(mode="after")
    def _batches_fit_into_memory(self) -> "Contract":
        rows = self.batching.max_batch_rows
        labels = (len(output.labels or ()) for output in self.outputs.values())
        for what, width in (("inputs", len(self.columns())), ("outputs", sum(labels))):
            if rows * width > _MOST_NUMBERS:
                raise ValueError(
                    f"batching.max_batch_rows: {rows:,} rows of {width:,} {what} are more than "
                    f"{_MOST_NUMBERS:,} numbers"
                )
        return self

    @model_validator(mode="after")
    def _decides_on_an_output(self) -> "Contract":
        if self.decision is None:
            return self
        if self.decision.output not in self.outputs:
            raise ValueError(f"decision.output: no output is named {self.decision.output!r}")
        if self.outputs[self.decision.output].labels is None and self.decision.at_least is None:
            raise ValueError("decision.at_least: a single number needs a threshold")
        return self

    @model_validator(mode="after")
    def _compares_an_output(self) -> "Contract":
        if self.score not in self.outputs:
            raise ValueError(f"compared_output: no output is named {self.score!r}")
        if self.labels is not None:
            labelled = self.outputs[self.score].labels is not None
            if labelled != (self.labels.kind == "class"):
                raise ValueError(f"labels.kind: {self.labels.kind} is not what {self.score!r} says")
        return self

    @model_validator(mode="after")
    def _equivalents_can_be_compared(self) -> "Contract":
        if self.release.kind == "equivalent" and not (
            self.decision is not None and self.score_is_probability
        ):
            raise ValueError(
                "release.kind: an equivalent version is judged by flips and a shift of the score: "
                "that needs a `decision` and a probability (labelled outputs, or `labels`)"
            )
        return self

    @model_validator(mode="after")
    def _segments_are_few(self) -> "Contract":
        names = [name for key, segment in self.segments.items() for name in segment.names(key)]
        if len(names) > MAX_SEGMENTS:
            raise ValueError(f"segments: {len(names)} of them, at most {MAX_SEGMENTS}")
        return self

    @property
    def score(self) -> str:
        """The output by which versions are compared and judged."""
        decided = None if self.decision is None else self.decision.output
        return self.compared_output or decided or next(iter(self.outputs))

    @cached_property
    def label_digest(self) -> bytes:
        """Of all that says how predictions are kept for labels, and nothing else: versions whose
        contracts agree in it keep theirs together. Reckoned once: every request asks."""
        asked = self.model_dump_json(include={"labels", "segments"}, by_alias=True)
        judged = repr((self.score, self.outputs[self.score].labels))
        return hashlib.sha256(f"{asked}{judged}".encode()).digest()[:8]

    @property
    def score_is_probability(self) -> bool:
        """Whether the compared output lies between 0 and 1, as far as the contract says."""
        labelled = self.outputs[self.score].labels is not None
        return labelled or (self.labels is not None and self.labels.kind == "binary")

    @property
    def threshold(self) -> float | None:
        """From which score on the decision is true; None where the score is no single number, or
        decides nothing."""
        if self.decision is None or self.decision.output != self.score:
            return None
        return None if self.outputs[self.score].labels is not None else self.decision.at_least

    def columns(self) -> tuple[Column, ...]:
        """Every column of every input, in order."""
        return tuple(column for tensor in self.inputs for column in tensor.columns)

    def inputs_document(self) -> dict[str, Any]:
        """What a published version was trained for: a change here needs a new version."""
        document = self.model_dump(mode="json", by_alias=True)
        return {key: document[key] for key in ("feature_service", "request_fields", "inputs")}


def is_stored_feature(source: str) -> bool:
    """`view:feature` is a stored feature, a plain name is a field of the instance."""
    return ":" in source


def load_contract(path: Path) -> Contract:
    """Read a model.yaml. Raises `InvalidModel` naming the file and every field at fault."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as exc:
        raise InvalidModel(f"{path}: no such file") from exc
    return parse_contract(content, str(path))


def parse_contract(content: bytes, what: str) -> Contract:
    """The content of a model.yaml. Raises `InvalidModel` naming `what` and every field at fault."""
    try:
        text = content.decode()
        _check_form(text, what)
        document = yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise InvalidModel(f"{what}: not YAML: {exc}") from exc
    try:
        return Contract.model_validate(document)
    except ValidationError as exc:
        raise InvalidModel(f"{what}: {faults_in(exc)}") from exc


def faults_in(exc: ValidationError) -> str:
    """What is wrong in a document and where, of many faults the first few."""
    if (
        exc.error_count() > _MOST_FAULTS
    ):  # to name them would take seconds, for which nobody answers
        return f"{exc.error_count():,} faults: this is no such document"
    found = exc.errors(include_url=False, include_context=False, include_input=False)
    shown = "; ".join(
        f"{_shortened('.'.join(map(str, fault['loc']))) or 'document'}: {_shortened(fault['msg'])}"
        for fault in found[:_SHOWN_FAULTS]
    )
    more = len(found) - _SHOWN_FAULTS
    return f"{shown}; and {more:,} more" if more > 0 else shown


def _check_form(text: str, what: str) -> None:
    """Raises `InvalidModel` for what the loader would recurse into or multiply without end (its
    parser does neither), and for a key that it would let another value of the same key replace."""
    keys: list[set[str] | None] = []
    """Of each mapping around, None for a list."""
    is_key: list[bool] = []
    for number, event in enumerate(yaml.parse(text, Loader=_LOADER)):
        if number >= _MOST_EVENTS:
            raise InvalidModel(f"{what}: has more than {_MOST_EVENTS:,} values, lists and mappings")
        if isinstance(event, yaml.AliasEvent):
            raise InvalidModel(f"{what}: has aliases (`*name`): write out what they stand for")
        if isinstance(event, yaml.CollectionEndEvent):
            keys.pop()
            is_key.pop()
        if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            continue
        of_mapping = keys[-1] if keys else None
        if of_mapping is not None:
            if is_key[-1] and isinstance(event, yaml.ScalarEvent):
                if event.value in of_mapping:
                    raise InvalidModel(f"{what}: {_shortened(event.value)}: is there twice")
                of_mapping.add(event.value)
            is_key[-1] = not is_key[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            keys.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
            is_key.append(True)
            if len(keys) > _MOST_DEPTH:
                raise InvalidModel(
                    f"{what}: lists and mappings lie in each other over {_MOST_DEPTH} deep"
                )


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
