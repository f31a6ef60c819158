"""Devices by name: peak rates, memory bandwidth, memory, and where each number comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import UsageError
from .names import nearest

_STAND_INS = {
    "bfloat16": ("float16", "float32"),
    "float16": ("bfloat16", "float32"),
    "float8_e4m3fn": ("bfloat16", "float16"),
    "float8_e5m2": ("float8_e4m3fn", "bfloat16", "float16"),
    "int8": ("bfloat16", "float16", "float32"),
    "uint8": ("int8", "bfloat16", "float16", "float32"),
}


@dataclass(frozen=True)
class Device:
    """The properties of a device that a roofline model needs.

    Attributes:
        name: lower case, as given by users.
        flops: dense peak in operations per second, by element type.
        bandwidth: memory bandwidth in bytes per second.
        memory: bytes of its own memory; None where it shares the host's.
        link: bytes per second to other devices, per direction; None where there is no such link.
        note: where the numbers come from, and what is a guess.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: int | None
    link: float | None = None
    note: str = ""

    def peak(self, kind: str = "bfloat16") -> float:
        """Return the peak in operations per second for an element type.

        A type that is not listed runs at the rate of the nearest wider listed type; any other at the slowest rate.
        """
        for name in (kind, *_STAND_INS.get(kind, ("float32",))):
            if name in self.flops:
                return self.flops[name]
        return min(self.flops.values())

    def ridge(self, kind: str = "bfloat16") -> float:
        """Return the arithmetic intensity, in operations per byte, above which arithmetic is the limit."""
        return self.peak(kind) / self.bandwidth

    def derated(self, compute: float = 1.0, bandwidth: float = 1.0) -> Device:
        """Return the device with these fractions of its peak rates, to model what kernels reach.

        Typical values are 0.5 to 0.7 of the arithmetic and 0.8 to 0.9 of the bandwidth on GPUs, and 0.5 to 0.7 of
        the bandwidth on NPUs.
        """
        if not (0 < compute <= 1 and 0 < bandwidth <= 1):
            raise UsageError(f"a device is derated to fractions of its peaks, not {compute} and {bandwidth}")
        return replace(
            self,
            flops={kind: rate * compute for kind, rate in self.flops.items()},
            bandwidth=self.bandwidth * bandwidth,
            note=f"{self.note}; derated to {compute:g} of its arithmetic, {bandwidth:g} of its bandwidth",
        )


_DATASHEET = "vendor data sheet, dense peaks; float32 and float64 without tensor cores"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "a100",
            {"bfloat16": 312e12, "float16": 312e12, "int8": 624e12, "float32": 19.5e12, "float64": 9.7e12},
            2.039e12, 80 * 10**9, 300e9, f"A100 SXM 80 GB, {_DATASHEET}",
        ),
        Device(
            "h100",
            {"bfloat16": 989e12, "float16": 989e12, "int8": 1979e12, "float8_e4m3fn": 1979e12,
             "float32": 67e12, "float64": 34e12},
            3.35e12, 80 * 10**9, 450e9, f"H100 SXM, {_DATASHEET}",
        ),
        Device(
            "h200",
            {"bfloat16": 989e12, "float16": 989e12, "int8": 1979e12, "float8_e4m3fn": 1979e12,
             "float32": 67e12, "float64": 34e12},
            4.8e12, 141 * 10**9, 450e9, f"H200 SXM, {_DATASHEET}",
        ),
        Device(
            "m4-ane", {"float16": 19e12, "int8": 19e12}, 0.12e12, None, None,
            "Apple M4 Neural Engine: 19 TFLOP/s measured in float16, of 38 marketed; int8 saves bandwidth "
            "only; about 32 MB of its own, memory and bandwidth shared with the host",
        ),
        Device(
            "npu-laptop", {"int8": 45e12, "float16": 22.5e12}, 0.135e12, None, None,
            "laptop NPUs such as X Elite and Lunar Lake: 45 to 48 TOPS in int8, float16 at half of it is a "
            "guess; bandwidth recalled and shared with the host; a dispatch of about 0.1 ms is not counted",
        ),
        Device(
            "cpu", {"float32": 1e12, "bfloat16": 1e12, "int8": 2e12, "float64": 0.5e12},
            50e9, 32 * 10**9, None,
            "a guess: a desktop processor of no particular make; measure before trusting it",
        ),
    )
}  # fmt: skip
"""Known devices by name."""


def find_device(name: str) -> Device:
    """Return a device by name.

    Raises:
        UsageError: there is none of that name.
    """
    device = DEVICES.get(name.lower())
    if device is None:
        raise UsageError(f"no device is called {name!r}", hint=nearest(name, DEVICES))
    return device
