"""Batches of an MLP on a GPU: our backend with and without IO binding, plain ONNX Runtime, PyTorch.

    make bench-gpu      (BENCH="--provider cuda --rounds 7 --json FILE")

THE GPU PART HAS NOT RUN YET: no machine with one was to be had. `--provider cpu` has, and executes
every line but PyTorch's. On a machine with a GPU, give Make an environment (`BENCH_PYTHON`) of
requirements/service-gpu.txt with the packages `onnx` and `torch`; what is missing there is left out
with a sentence.

Each contender gets NumPy rows and must return NumPy rows, one batch at a time. They take turns
within each round, in an order that is reversed from round to round. p99 is over all rounds.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from app.backends.onnx_backend import OnnxBackend, open_onnx
from app.backends.onnx_session import SHORT_NAMES
from app.contract import OnnxOptions
from app.deadline import Deadline
from app.errors import InvalidModel

Rows: TypeAlias = NDArray[np.float32]
Weights: TypeAlias = Sequence[tuple[Rows, Rows]]
Execute: TypeAlias = Callable[[Rows], Awaitable[Rows]]

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MOST_P99_S = 0.005
SEED = 20131231


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--provider", default="cuda", help="cuda, tensorrt, cpu or a full name")
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--width", type=int, default=1024, help="of each of the two hidden layers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=50, help="of each batch size in a round")
    parser.add_argument("--max-rows", type=int, default=SIZES[-1])
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    try:
        asyncio.run(compare(arguments))
    except InvalidModel as exc:
        sys.exit(f"Nothing was measured. {exc}")


async def compare(arguments: argparse.Namespace) -> None:
    weights = random_weights((arguments.features, arguments.width, arguments.width, 1))
    sizes = [size for size in SIZES if size <= arguments.max_rows]
    rows = np.random.default_rng(SEED).normal(size=(sizes[-1], arguments.features))
    x = rows.astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        model.write_bytes(onnx_file(weights))
        ours = {
            binding: await warm_backend(model, arguments.provider, x, io_binding=binding)
            for binding in (True, False)
        }
        contenders = {
            "ours, bound": through(ours[True]),
            "ours, not bound": through(ours[False]),
            "onnxruntime": plain_onnxruntime(model, arguments.provider),
        }
        torch = torch_eager(weights, arguments.provider)
        if torch is not None:
            contenders["PyTorch eager"] = torch
        await check_answers(contenders, weights, x)
        seconds = await measure(contenders, x, sizes, arguments.rounds, arguments.runs)
        for backend in ours.values():
            await backend.close()
    report(seconds, sizes)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures(seconds), indent=2))


async def warm_backend(model: Path, provider: str, x: Rows, *, io_binding: bool) -> OnnxBackend:
    options = OnnxOptions(use="onnx", providers=(provider,), io_binding=io_binding)
    backend = await open_onnx(options, model, ["y"])
    await backend.warm_up({"x": x}, len(x))
    return backend


def through(backend: OnnxBackend) -> Execute:
    async def execute(x: Rows) -> Rows:
        return (await backend.execute({"x": x}, Deadline.after(60)))["y"]

    return execute


def plain_onnxruntime(model: Path, provider: str) -> Execute:
    """As its own documentation has it: no options, `run`."""
    providers = list(dict.fromkeys([SHORT_NAMES.get(provider, provider), "CPUExecutionProvider"]))
    session = onnxruntime.InferenceSession(str(model), providers=providers)

    async def execute(x: Rows) -> Rows:
        result: Rows = session.run(["y"], {"x": x})[0]
        return result

    return execute


def torch_eager(weights: Weights, provider: str) -> Execute | None:
    try:
        import torch
    except ModuleNotFoundError:
        print("PyTorch is not installed: its eager forward is left out.")
        return None
    device = "cpu" if provider == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no GPU: its eager forward is left out.")
        return None
    layers: list[Any] = []
    for weight, bias in weights:
        linear = torch.nn.Linear(*weight.shape)
        linear.weight.data = torch.from_numpy(weight.T.copy())
        linear.bias.data = torch.from_numpy(bias)
        layers += [linear, torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1]).to(device).eval()

    async def execute(x: Rows) -> Rows:
        with torch.inference_mode():
            result: Rows = network(torch.from_numpy(x).to(device)).cpu().numpy()
        return result

    return execute


async def check_answers(contenders: Mapping[str, Execute], weights: Weights, x: Rows) -> None:
    """Says how far each is from float64; ends the run where that is more than float32 explains."""
    exact = x.astype(np.float64)
    for at, (weight, bias) in enumerate(weights):
        exact = exact @ weight + bias
        if at < len(weights) - 1:
            exact = np.maximum(exact, 0)
    for name, execute in contenders.items():
        difference = float(np.abs(await execute(x) - exact).max())
        print(f"{name}: at most {difference:.1e} from float64")
        if difference > 1e-2 * np.abs(exact).max():  # TF32 keeps 10 bits
            sys.exit(f"{name} answers wrongly")


async def measure(
    contenders: Mapping[str, Execute], x: Rows, sizes: Sequence[int], rounds: int, runs: int
) -> dict[str, dict[int, list[float]]]:
    """Seconds of every execution, by contender and batch size."""
    seconds: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in sizes} for name in contenders
    }
    for at, size in itertools.product(range(rounds), sizes):
        names = list(contenders) if at % 2 else list(reversed(contenders))
        batch = x[:size]
        for name in names:
            await contenders[name](batch)  # what the one before left in the caches
            for _ in range(runs):
                started_s = time.perf_counter()
                await contenders[name](batch)
                seconds[name][size].append(time.perf_counter() - started_s)
    return seconds


def report(seconds: Mapping[str, Mapping[int, Sequence[float]]], sizes: Sequence[int]) -> None:
    print(f"\n{'µs: median (p99)':18}" + "".join(f"{name:>20}" for name in seconds))
    for size in sizes:
        cells = (f"{median(of[size]):.0f} ({p99(of[size]):.0f})" for of in seconds.values())
        print(f"{size:>9} rows    " + "".join(f"{cell:>20}" for cell in cells))
    print(f"\nmost rows/s, one batch at a time, at p99 <= {MOST_P99_S * 1000:.0f} ms:")
    for name, of in seconds.items():
        size, rate = fastest(of)
        print(f"{name:>18}: {rate:,.0f} in batches of {size}" if size else f"{name:>18}: none")


def figures(seconds: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, Any]:
    return {
        name: {
            "median_us": {size: median(values) for size, values in of.items()},
            "p99_us": {size: p99(values) for size, values in of.items()},
            "rows_per_s": fastest(of)[1],
        }
        for name, of in seconds.items()
    }


def fastest(of: Mapping[int, Sequence[float]]) -> tuple[int, float]:
    """The batch size that gives most rows a second within the limit, and how many; 0 if none."""
    rates = {
        size: size * len(values) / sum(values)
        for size, values in of.items()
        if p99(values) <= MOST_P99_S * 1e6
    }
    best = max(rates, key=rates.__getitem__, default=0)
    return best, rates.get(best, 0.0)


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) * 1e6


def p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99)) * 1e6


def random_weights(widths: Sequence[int]) -> Weights:
    random = np.random.default_rng(SEED)
    return [
        (
            random.normal(scale=before**-0.5, size=(before, after)).astype(np.float32),
            random.normal(size=after).astype(np.float32),
        )
        for before, after in itertools.pairwise(widths)
    ]


def onnx_file(weights: Weights) -> bytes:
    nodes, values, last = [], [], "x"
    for at, (weight, bias) in enumerate(weights):
        values += [
            numpy_helper.from_array(weight, f"w{at}"),
            numpy_helper.from_array(bias, f"b{at}"),
        ]
        is_output = at == len(weights) - 1
        nodes.append(
            helper.make_node("Gemm", [last, f"w{at}", f"b{at}"], ["y" if is_output else f"sum{at}"])
        )
        if not is_output:
            last = f"relu{at}"
            nodes.append(helper.make_node("Relu", [f"sum{at}"], [last]))
    (first, _), (final, _) = weights[0], weights[-1]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", 1, ["rows", first.shape[0]])],
        [helper.make_tensor_value_info("y", 1, ["rows", final.shape[1]])],
        values,
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    content: bytes = model.SerializeToString()
    return content


if __name__ == "__main__":
    main()
