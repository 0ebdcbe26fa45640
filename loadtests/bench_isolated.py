"""What a process of its own costs: an execution through it and in process, its start, its end.

    make bench-isolated      (BENCH="--rounds 500")

The model is a perceptron of 32 inputs and two hidden layers, made here. Executions alternate
between the two backends, so that what else the machine does falls on both.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import uvloop
from onnx import TensorProto, helper, numpy_helper

from app.backends import open_backend
from app.backends.backend import Backend, BackendDied
from app.contract import Isolation, OnnxOptions
from app.deadline import Deadline
from app.tensors import Signature, Tensors, TensorSpec

WIDTH = 32
ROWS = (1, 64, 1000)
SIGNATURE = Signature((TensorSpec("x", "float32", (WIDTH,)),), (TensorSpec("y", "float32", (1,)),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--deaths", type=int, default=5)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        model = Path(folder) / "model.onnx"
        model.write_bytes(perceptron(arguments.hidden))
        runner.run(bench(model, arguments.rounds, arguments.deaths))


async def bench(model: Path, rounds: int, deaths: int) -> None:
    inside = await open_backend(OnnxOptions(use="onnx"), model, SIGNATURE)
    started_s = time.perf_counter()
    isolated = await open_backend(OnnxOptions(use="onnx", isolated=Isolation()), model, SIGNATURE)
    print(f"{time.perf_counter() - started_s:8.2f} s to ready")
    example = {"x": np.ones((1, WIDTH), np.float32)}
    for backend in (inside, isolated):
        await backend.warm_up(example, max(ROWS))
    for rows in ROWS:
        await compare(inside, isolated, rows, rounds)
    for rows in ROWS[:2]:
        await throughput(isolated, rows, rounds)
    seconds = [await after_death_s(isolated, example) for _ in range(deaths)]
    print(f"{statistics.median(seconds):8.2f} s from death to the next answer")
    await inside.close()
    await isolated.close()


async def compare(inside: Backend, isolated: Backend, rows: int, rounds: int) -> None:
    inputs = {"x": np.random.default_rng(rows).random((rows, WIDTH), np.float32)}
    taken: dict[Backend, list[float]] = {inside: [], isolated: []}
    for _ in range(rounds):
        for backend, seconds in taken.items():
            seconds.append(await execution_s(backend, inputs))
    own_us, other_us = (1e6 * statistics.median(seconds) for seconds in taken.values())
    print(
        f"{other_us:8.0f} µs an execution of {rows} rows, in process {own_us:.0f} µs: "
        f"{other_us - own_us:.0f} µs more, ratio {other_us / own_us:.2f}"
    )


async def throughput(backend: Backend, rows: int, rounds: int) -> None:
    """With one execution at a time, and with one sent ahead."""
    inputs = {"x": np.random.default_rng(rows).random((rows, WIDTH), np.float32)}

    async def caller(executions: int) -> None:
        for _ in range(executions):
            await execution_s(backend, inputs)

    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(7):
        for callers, found in rates.items():
            started_s = time.perf_counter()
            await asyncio.gather(*(caller(rounds // callers) for _ in range(callers)))
            found.append(rounds / (time.perf_counter() - started_s))
    one, two = (statistics.median(found) for found in rates.values())
    print(f"{two:8.0f} executions of {rows} rows a second with one ahead, ratio {two / one:.2f}")


async def execution_s(backend: Backend, inputs: Tensors) -> float:
    started_s = time.perf_counter()
    await backend.execute(inputs, Deadline.after(60))
    return time.perf_counter() - started_s


async def after_death_s(backend: Backend, inputs: Tensors) -> float:
    """From the signal to the first answer that is not the death of what was under way."""
    os.kill(child(), signal.SIGKILL)
    started_s = time.perf_counter()
    with contextlib.suppress(BackendDied):  # it was sent before the end was seen
        await execution_s(backend, inputs)
        raise RuntimeError("a killed process answered")
    await execution_s(backend, inputs)
    return time.perf_counter() - started_s


def child() -> int:
    return int(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[0])


def perceptron(hidden: int) -> bytes:
    """An ONNX file: `x` `[n, 32]` → `y` `[n, 1]`."""
    sizes = (WIDTH, hidden, hidden, 1)
    random = np.random.default_rng(0)
    nodes, weights, at = [], [], "x"
    for layer, shape in enumerate(itertools.pairwise(sizes)):
        matrix = random.normal(size=shape).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [at, f"w{layer}"], [f"h{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"h{layer}"], [f"t{layer}"]))
        at = f"t{layer}"
    nodes.append(helper.make_node("Identity", [at], ["y"]))
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 1])],
        weights,
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
