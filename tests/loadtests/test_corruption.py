"""What is called corrupted is."""

import random
from pathlib import Path

from loadtests.corruption import corrupt


def test_exactly_one_file_is_changed(tmp_path: Path) -> None:
    files = {"manifest.json": b'{"a": 1}\n', "model.onnx": b"\0\1\2\0", "plan.json": b"{}"}
    said = set()
    for seed in range(60):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        how = corrupt(tmp_path, random.Random(seed))
        left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        changed = [name for name in files if left.get(name) != files[name]]
        assert changed == [how.partition(":")[0]]
        said.add(how.partition(": ")[2].split()[0])
    assert said == {"bit", "cut", "empty", "longer", "zeros", "removed"}
