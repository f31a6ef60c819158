"""Child process that runs kernels in Triton's interpreter, or compiles them for GPUs that this machine lacks.

Both change Triton for the whole process. The request is a JSON object on standard input, the answer one on the last
line of standard output.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def _interpret(request: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    from .cases import EVEN, RAGGED, cases
    from .comparing import Compared, compare
    from .launching import launching, plainly

    results = []
    for case in [*cases(RAGGED), *cases(EVEN)]:
        if request["operators"] and case.operator not in request["operators"]:
            continue
        # the interpreter silently computes bfloat16 wrongly
        for dtype in (torch.float32, torch.float16) if case.typed else (torch.float32,):
            try:
                with launching(plainly):
                    result = compare(case, dtype)
            except Exception as error:
                name = str(dtype).removeprefix("torch.")
                result = Compared(
                    case.operator, case.what, name, 0.0, 0.0, f"{type(error).__name__}: {error}"
                )
            results.append({**asdict(result), "holds": result.holds})
    return results


def _trace(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Trace functions that launch kernels with dynamic sizes, as torch.compile and AOTInductor do."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    from .cases import Tensors, cases
    from .stub_driver import ARCHITECTURES, pretend
    from .wiring import TABLE

    pretend(ARCHITECTURES["sm_90"], 0)
    rows = []
    for case in cases():
        args, options = case.args(Tensors(torch.float32))
        tensor_indices = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]

        def launched(
            *tensors: Any,
            case: Any = case,
            args: Any = args,
            options: Any = options,
            tensor_indices: Any = tensor_indices,
        ) -> Any:
            every = list(args)
            for index, tensor in zip(tensor_indices, tensors, strict=True):
                every[index] = tensor
            return TABLE[case.operator].launch(*every, **options)

        graph = make_fx(launched, tracing_mode="symbolic")(*(args[i] for i in tensor_indices)).graph
        kernels = sum("triton_kernel_wrapper" in str(node.target) for node in graph.nodes)
        rows.append({"operator": case.operator, "what": case.what, "kernels": kernels})
    return rows


def _tensors(value: Any) -> Any:
    import torch

    if isinstance(value, dict) and "shape" in value:
        dtype = getattr(torch, value["dtype"])
        return torch.empty_strided(value["shape"], value["stride"], dtype=dtype, device="meta")
    return value


def _compile(request: dict[str, Any]) -> list[dict[str, Any]]:
    from .launching import launching
    from .resources import resources_of
    from .stub_driver import ARCHITECTURES, pretend
    from .wiring import TABLE

    folder = Path(request["folder"]) if request["folder"] else None
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(request["architectures"]):
        architecture = ARCHITECTURES[name]
        pretend(architecture, number)
        compiled_keys: set[str] = set()
        for call in request["calls"]:
            launched: list[tuple[Any, Any]] = []

            def compiled(
                kernel: Any, grid: Sequence[Any], args: Any, meta: Any, into: list[Any] = launched
            ) -> None:
                into.append((kernel, kernel.warmup(*args, grid=(1,), **meta)))

            row = {"operator": call["operator"], "what": call["what"], "architecture": name}
            try:
                with launching(compiled):
                    args = [_tensors(a) for a in call["args"]]
                    options = {k: _tensors(v) for k, v in call["options"].items()}
                    TABLE[call["operator"]].launch(*args, **options)
                for kernel, specialization in launched:
                    used = resources_of(specialization, architecture)
                    file = f"{kernel.__name__}-{specialization.hash[:12]}.{name}"
                    if folder is not None and file not in compiled_keys:
                        compiled_keys.add(file)
                        _write(folder, file, specialization)
                    reason = used.too_much(architecture)
                    if request["doubles"] and not reason:
                        reason = _in_doubles(specialization)
                    rows.append(
                        {**row, "kernel": kernel.__name__, "file": file, "reason": reason, **asdict(used)}
                    )
            except Exception as error:
                rows.append(
                    {
                        **row,
                        "kernel": "",
                        "file": "",
                        "reason": _shortened(f"{type(error).__name__}: {error}"),
                    }
                )
    return rows


def _shortened(text: str) -> str:
    """Return a message without its middle: Triton puts the source first and what is wrong with it last."""
    return text if len(text) <= 600 else f"{text[:150]} [...] {text[-450:]}"


def _in_doubles(ir_text: Any) -> str:
    """Return why a kernel cannot take double-precision scalars, as torch.compile passes them; empty if it can."""
    import re

    import triton
    from triton.compiler import ASTSource

    source = ir_text.src
    signature = {name: "fp64" if kind == "fp32" else kind for name, kind in source.signature.items()}
    if signature == dict(source.signature):
        return ""
    wide = ASTSource(fn=source.fn, signature=signature, constexprs=source.constants, attrs=source.attrs)
    options = {name: getattr(ir_text.metadata, name) for name in ("num_warps", "num_stages")}
    compiled = triton.compile(wide, target=ir_text.metadata.target, options=options)
    kinds = re.findall(
        r"\b(add|sub|mul|fma|div|max|min|setp|sqrt|rsqrt)\S*\.f64", compiled.asm.get("ptx", "")
    )
    return f"{len(kinds)} operations in double precision under torch.compile" if kinds else ""


def _write(folder: Path, name: str, compiled: Any) -> None:
    for kind in ("cubin", "ptx", "hsaco"):
        if kind in compiled.asm:
            artifact = compiled.asm[kind]
            (folder / f"{name}.{kind}").write_bytes(
                artifact if isinstance(artifact, bytes) else artifact.encode()
            )
    metadata = {
        k: v for k, v in compiled.metadata._asdict().items() if isinstance(v, (str, int, float, bool))
    }
    text = json.dumps(metadata, indent=1, sort_keys=True)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    # fused multiply-add, set explicitly because Triton's default will change
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if request["mode"] == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
        rows = _interpret(request)
    elif request["mode"] == "trace":
        rows = _trace(request)
    else:
        rows = _compile(request)
    print("\n" + json.dumps(rows))


if __name__ == "__main__":
    main()
