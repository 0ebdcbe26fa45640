"""A model file in ONNX Runtime, on the first preferred provider that really starts."""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# The wheel would write a device id below the home folder and may send usage data.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from app.contract import OnnxOptions
from app.errors import BackendError, InvalidModel, ModelNotReady
from app.tensors import Signature, Tensor, Tensors, TensorSpec

CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
SHORT_NAMES = {"cpu": CPU, "cuda": _CUDA, "tensorrt": _TENSORRT}
ON_CUDA = {_CUDA, _TENSORRT}
# Doubling what it holds would let two models that fit run out of memory.
_PROVIDER_DEFAULTS = {_CUDA: {"arena_extend_strategy": "kSameAsRequested"}}
_OPTIMISATIONS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
}
# What the arenas, the C++ library, CUDA and cuBLAS say.
_OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED")
_FATAL = 4


class OutOfMemory(BackendError):
    """The rows need more memory than there is; fewer of them may not."""


class OnnxRun:
    """One run of a session that may be told to end."""

    def __init__(self) -> None:
        self.options = ort.RunOptions()
        # The exception says it; the library would also write it to stderr, for every bad row.
        self.options.log_severity_level = _FATAL
        # No graph is captured of a run whose memory is another one each time. Without this entry
        # the Python wrapper pays 70 µs in a bound run, for an exception that it catches.
        self.options.add_run_config_entry("gpu_graph_id", "-1")

    def give_up(self) -> None:
        """End at the next node of the graph: a node that is under way is not interrupted."""
        self.options.terminate = True


WHOLE_RUN = OnnxRun()


class OnnxSession:
    """`passed_over` says of each provider preferred to `provider` why it is not used.

    Raises `InvalidModel` when the file cannot be loaded, does not compute `outputs`, or when none
    of the providers starts. Several threads may run it at once: they share its weights.
    """

    def __init__(self, options: OnnxOptions, model: Path, outputs: Sequence[str]) -> None:
        self._options = options
        self._model = model
        self._outputs = list(outputs)
        self.passed_over: dict[str, str] = {}
        self.provider, session = self._first_that_starts()
        self._session: ort.InferenceSession | None = session
        known = {node.name for node in session.get_outputs()}
        missing = [name for name in outputs if name not in known]
        if missing:
            raise InvalidModel(f"{model}: has no output {missing}, it has {sorted(known)}")
        self.signature = Signature(
            tuple(_spec(node) for node in session.get_inputs()),
            tuple(_spec(node) for node in session.get_outputs() if node.name in self._outputs),
        )
        of_provider: Mapping[str, str] = session.get_provider_options().get(self.provider, {})
        self.device_id = int(of_provider.get("device_id", 0))
        self.io_binding = self._is_bound()

    @property
    def is_loaded(self) -> bool:
        """False while `rebuild` is under way, and after it failed."""
        return self._session is not None

    def describe(self) -> dict[str, Any]:
        """What is used, for the log at start."""
        return {
            "provider": self.provider,
            "passed_over": self.passed_over,
            "onnxruntime": ort.__version__,
            "device_id": self.device_id if self.provider != CPU else None,
            "threads": self._options.threads,
            "instances": self._options.instances,
            "io_binding": self.io_binding,
        }

    def run(self, inputs: Tensors, run: OnnxRun = WHOLE_RUN) -> Tensors:
        """The outputs that were asked for. Raises `BackendError` (`OutOfMemory` where it was that),
        `ModelNotReady` while there is no session."""
        session = self._session
        if session is None:
            raise ModelNotReady("ONNX Runtime ran out of memory; the model is being loaded again")
        try:
            if self.io_binding:
                results = self._run_bound(session, inputs, run)
            else:
                results = session.run(self._outputs, dict(inputs), run.options)
        except Exception as exc:  # onnxruntime raises RuntimeError and its own bare Exceptions
            text = str(exc)
            kind = OutOfMemory if any(sign in text for sign in _OUT_OF_MEMORY) else BackendError
            raise kind(f"ONNX Runtime: {text}") from exc
        return dict(zip(self._outputs, results, strict=True))

    def rebuild(self) -> None:
        """Load the file again with the same provider. Raises `InvalidModel`."""
        self._session = None  # first: the device may not have room for both
        self._session = self._load(self.provider)

    def _run_bound(
        self, session: ort.InferenceSession, inputs: Tensors, run: OnnxRun
    ) -> Sequence[Tensor]:
        """Inputs are copied to the device when they are bound; each output is made there and
        copied once."""
        device = "cuda" if self.provider in ON_CUDA else "cpu"
        binding = session.io_binding()
        # The binding points into the arrays: they must outlive the run.
        whole = {name: _in_one_piece(tensor) for name, tensor in inputs.items()}
        for name, tensor in whole.items():
            binding.bind_cpu_input(name, tensor)
        for name in self._outputs:
            binding.bind_output(name, device, self.device_id)
        session.run_with_iobinding(binding, run.options)
        results: Sequence[Tensor] = binding.copy_outputs_to_cpu()
        return results

    def _first_that_starts(self) -> tuple[str, ort.InferenceSession]:
        available = ort.get_available_providers()
        for name in map(_full_name, self._options.providers):
            if name not in available:
                self.passed_over[name] = f"not among {available}{_both_packages(name)}"
                continue
            try:
                session = self._load(name)
            except InvalidModel as exc:
                self.passed_over[name] = str(exc)
                continue
            if session.get_providers()[0] == name:
                return name, session
            # What it logs then is the only place where ONNX Runtime says why.
            self.passed_over[name] = "it did not start; ONNX Runtime wrote the reason to stderr"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items())
        raise InvalidModel(f"{self._model}: no provider of model.yaml can execute it: {reasons}")

    def _load(self, name: str) -> ort.InferenceSession:
        """With the CPU behind the provider, for the nodes that it does not execute."""
        if name in ON_CUDA:
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses
                ort.preload_dlls()  # from the wheels of the extra `gpu`
        wanted = [_full_name(provider) for provider in self._options.providers]
        available = ort.get_available_providers()
        behind = [other for other in wanted[wanted.index(name) + 1 :] if other in available]
        providers = [
            (each, _PROVIDER_DEFAULTS.get(each, {}) | _of_provider(self._options, each))
            for each in dict.fromkeys([name, *behind, CPU])
        ]
        try:
            return ort.InferenceSession(
                str(self._model),
                _session_options(self._options),
                providers=providers,
                enable_fallback=0,  # it would print and go on with another provider
            )
        except Exception as exc:  # onnxruntime raises its own exceptions without a common base
            raise InvalidModel(f"{self._model}: ONNX Runtime cannot load it: {exc}") from exc

    def _is_bound(self) -> bool:
        specs = (*self.signature.inputs, *self.signature.outputs)
        if any(spec.dtype == "str" for spec in specs):
            return False  # texts cannot be bound
        if self._options.io_binding is None:
            return self.provider in ON_CUDA
        return self._options.io_binding


def _session_options(options: OnnxOptions) -> ort.SessionOptions:
    session = ort.SessionOptions()
    session.intra_op_num_threads = options.threads
    session.inter_op_num_threads = options.parallel_nodes
    if options.parallel_nodes > 1:
        session.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    for pool in ("intra_op", "inter_op"):
        session.add_session_config_entry(
            f"session.{pool}.allow_spinning", "1" if options.spinning else "0"
        )
    session.enable_cpu_mem_arena = options.memory_arena
    session.enable_mem_pattern = options.memory_pattern
    session.graph_optimization_level = _OPTIMISATIONS[options.graph_optimisation]
    return session


def _full_name(provider: str) -> str:
    return SHORT_NAMES.get(provider, provider)


def _of_provider(options: OnnxOptions, name: str) -> dict[str, str]:
    """What model.yaml says of this provider, as ONNX Runtime wants it: text."""
    return {
        key: str(int(value) if isinstance(value, bool) else value)
        for provider, values in options.provider_options.items()
        if _full_name(provider) == name
        for key, value in values.items()
    }


def _both_packages(name: str) -> str:
    """Why CUDA is absent where the package for it is installed."""
    if name not in ON_CUDA or not _is_installed("onnxruntime-gpu"):
        return ""
    if _is_installed("onnxruntime"):
        return " (onnxruntime and onnxruntime-gpu overwrite each other: install one, afresh)"
    return " (although onnxruntime-gpu is installed)"


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _in_one_piece(tensor: Tensor) -> Tensor:
    """A binding reads the memory as it lies."""
    return tensor if tensor.flags.c_contiguous else tensor.copy(order="C")


def _spec(node: Any) -> TensorSpec:
    if node.type not in _DTYPES:
        raise InvalidModel(f"{node.name}: tensors of type {node.type} cannot be served")
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape[1:])
    return TensorSpec(node.name, _DTYPES[node.type], shape)
