"""What the Python backend of our test Triton executes: model.onnx, or the mischief a row asks for.

What a row asks for harms the batch that it is executed in.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from triton_markers import DIE, RAISE, SHORT, SLEEP

_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(int64)": "TYPE_INT64",
    "tensor(int32)": "TYPE_INT32",
    "tensor(bool)": "TYPE_BOOL",
    "tensor(string)": "TYPE_STRING",
}


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        known = config.as_dict()
        versions = Path(__file__).parent
        session = _session(versions)
        for node in session.get_inputs():
            config.add_input(_described(node))
        for node in session.get_outputs():
            config.add_output(_described(node))
        if known["max_batch_size"]:
            config.set_dynamic_batching()
        return config

    def initialize(self, args):
        self._session = _session(Path(args["model_repository"]) / args["model_version"])
        self._outputs = [output["name"] for output in json.loads(args["model_config"])["output"]]

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        inputs = {name: _text(tensor) for name, tensor in inputs.items()}
        outputs = self._session.run(self._outputs, inputs)
        for row in next(iter(inputs.values())):
            outputs = _mischief(row, outputs)
        tensors = [
            pb_utils.Tensor(name, tensor if tensor.ndim > 1 else tensor.reshape(-1, 1))
            for name, tensor in zip(self._outputs, outputs, strict=True)
        ]
        return pb_utils.InferenceResponse(tensors)


def _mischief(row, outputs):
    marker = row[0]
    if marker == RAISE:
        raise ValueError("a row asked for it")
    if marker == SLEEP:
        time.sleep(row[1] / 1000)
    if marker == DIE:
        os._exit(1)
    if marker == SHORT:
        return [tensor[:-1] for tensor in outputs]
    return outputs


def _session(version_dir):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        str(version_dir / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def _described(node):
    dims = [size if isinstance(size, int) else -1 for size in node.shape[1:]]
    return {"name": node.name, "data_type": _TYPES[node.type], "dims": dims or [1]}


def _text(tensor):
    if tensor.dtype != np.object_:
        return tensor
    return np.array([value.decode() for value in tensor.reshape(-1)], object).reshape(tensor.shape)
