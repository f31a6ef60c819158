"""Single operators as they are tried on a device: the forms in which programs use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """An operand of a case: an input of numbers from ``low`` to ``high``, a constant of them, or given integers.

    Attributes:
        shape: its sizes.
        role: "input", "weight" (a constant that is quantised as weights are), "constant", "condition" or "integers".
        low: least value.
        high: largest value.
        values: of integers.
    """

    shape: Shape = ()
    role: str = "input"
    low: float = -1.0
    high: float = 1.0
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """One operator with its operands and attributes.

    Attributes:
        operator: of ONNX's standard.
        form: how this form differs from others.
        operands: in order; None leaves one out.
        attributes: of the node.
        output: rank of the output does not matter; its type: "float", "int64" or "bool".
        passes: the operator moves values and computes nothing, so that quantised forms share one scale.
        limit: empty for a form that programs have; others tell a limit: of "dimensions", or whether weights may have a
            scale for each "block" of inputs; "fault": known to go wrong, and written otherwise by fit-target.
        block: how many inputs share a weight's scale; 0: all.
    """

    operator: str
    form: str
    operands: tuple[Operand | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    output: str = "float"
    passes: bool = False
    limit: str = ""
    block: int = 0

    @property
    def weighted(self) -> bool:
        """Whether it has a weight, which may have fewer bits than activations."""
        return any(o is not None and o.role == "weight" for o in self.operands)


def x(*shape: int, low: float = -1.0, high: float = 1.0) -> Operand:
    """An input."""
    return Operand(shape, "input", low, high)


def w(*shape: int) -> Operand:
    """A weight."""
    return Operand(shape, "weight")


def c(*shape: int, low: float = -1.0, high: float = 1.0) -> Operand:
    """Another constant of numbers."""
    return Operand(shape, "constant", low, high)


def b(*shape: int) -> Operand:
    """An input of truths."""
    return Operand(shape, "condition")


def i(*values: int, shape: Shape | None = None) -> Operand:
    """Integers."""
    return Operand((len(values),) if shape is None else shape, "integers", values=values)


X3, X4 = x(1, 8, 16), x(1, 4, 8, 16)
_UNARY = ("Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Elu", "LeakyRelu", "Softplus", "Mish", "Softsign", "Erf",
          "Exp", "Abs", "Neg", "Sin", "Cos", "Floor", "Round", "Sign")  # fmt: skip
_POSITIVE = ("Sqrt", "Log", "Reciprocal")
_BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min")
_REDUCING = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")

CASES: tuple[Case, ...] = (
    *(Case(name, "", (X3,)) for name in _UNARY),
    *(Case(name, "", (x(1, 8, 16, low=0.2, high=0.9),)) for name in _POSITIVE),
    Case("Gelu", "exact", (X3,)),
    Case("Gelu", "tanh", (X3,), {"approximate": "tanh"}),
    *(Case(name, "two inputs", (X3, x(1, 8, 16, low=0.5, high=2.0))) for name in _BINARY),
    *(Case(name, "constant second", (X3, c(16, low=0.5, high=2.0))) for name in ("Add", "Sub", "Mul", "Div")),
    Case("Pow", "square", (X3, Operand((), "constant", 2.0, 2.0))),
    Case("MatMul", "weight", (X3, w(16, 24))),
    Case("MatMul", "two inputs", (X4, x(1, 4, 16, 8))),
    Case("Gemm", "weight and bias", (x(4, 16), w(16, 24), c(24))),
    Case("Conv", "two-dimensional", (x(1, 8, 12, 12), w(16, 8, 3, 3), c(16)), {"pads": [1, 1, 1, 1]}),
    Case("Conv", "depthwise", (x(1, 8, 12, 12), w(8, 1, 3, 3), c(8)), {"group": 8, "pads": [1, 1, 1, 1]}),
    Case("Conv", "one-dimensional, dilated", (x(1, 8, 24), w(8, 8, 3), c(8)), {"dilations": [2]}),
    Case("Conv", "one-dimensional, dilated, two rows", (x(2, 8, 24), w(8, 8, 3), c(8)), {"dilations": [2]}),
    Case("Conv", "two-dimensional, dilated", (x(1, 8, 12, 12), w(8, 8, 3, 3), c(8)), {"dilations": [2, 2]}),
    Case("Conv", "two-dimensional, dilated, two rows", (x(2, 8, 12, 12), w(8, 8, 3, 3), c(8)), {"dilations": [2, 2]}),
    Case("Conv", "depthwise, nine entries, dilated", (x(1, 16, 42), w(16, 1, 9), c(16)), {"dilations": [2], "group": 16},
         limit="fault"),
    Case("Conv", "depthwise, nine entries of which each second is zero", (x(1, 16, 42), w(16, 1, 17), c(16)),
         {"group": 16}),
    Case("MatMul", "weight in blocks of 32", (x(1, 8, 64), w(64, 24)), limit="block", block=32),
    Case("Gemm", "weight in blocks of 32", (x(4, 64), w(64, 24), c(24)), limit="block", block=32),
    Case("ConvTranspose", "", (x(1, 8, 6, 6), w(8, 4, 2, 2), c(4)), {"strides": [2, 2]}),
    Case("Softmax", "last axis", (X4,), {"axis": -1}),
    Case("LogSoftmax", "last axis", (X3,), {"axis": -1}),
    Case("LayerNormalization", "", (X3, c(16, low=0.5, high=1.5), c(16)), {"axis": -1}),
    Case("RMSNormalization", "", (X3, c(16, low=0.5, high=1.5)), {"axis": -1}),
    Case("InstanceNormalization", "", (x(1, 8, 6, 6), c(8, low=0.5, high=1.5), c(8))),
    Case("BatchNormalization", "", (x(1, 8, 6, 6), c(8, low=0.5, high=1.5), c(8), c(8), c(8, low=0.5, high=1.5))),
    Case("LpNormalization", "", (X3,), {"axis": -1, "p": 2}),
    Case("Attention", "", (X4, X4, X4)),
    Case("Attention", "mask", (X4, X4, X4, x(1, 1, 8, 8, low=-4.0, high=0.0))),
    Case("Attention", "causal", (X4, X4, X4), {"is_causal": 1}),
    Case("Attention", "grouped heads", (X4, x(1, 2, 8, 16), x(1, 2, 8, 16))),
    Case("RotaryEmbedding", "", (X4, x(1, 8, 8), x(1, 8, 8))),
    *(Case(name, "", (X3, i(-1)), {"keepdims": 1}) for name in _REDUCING),
    Case("GlobalAveragePool", "", (x(1, 8, 6, 6),)),
    Case("AveragePool", "", (x(1, 8, 6, 6),), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    Case("MaxPool", "", (x(1, 8, 6, 6),), {"kernel_shape": [2, 2], "strides": [2, 2]}, passes=True),
    Case("Resize", "nearest", (x(1, 8, 6, 6), None, None, i(1, 8, 12, 12)), {"mode": "nearest"}, passes=True),
    Case("Reshape", "", (X3, i(1, 16, 8)), passes=True),
    Case("Transpose", "", (X4,), {"perm": [0, 2, 1, 3]}, passes=True),
    Case("Transpose", "five dimensions", (x(1, 2, 4, 4, 8),), {"perm": [0, 1, 3, 2, 4]}, passes=True),
    Case("Transpose", "six dimensions", (x(1, 2, 2, 4, 4, 4),), {"perm": [0, 2, 1, 4, 3, 5]}, passes=True,
         limit="dimensions"),
    Case("Slice", "", (X3, i(1), i(5), i(1)), passes=True),
    Case("Concat", "", (X3, X3), {"axis": 1}),
    Case("Split", "", (X3,), {"axis": -1, "num_outputs": 2}, passes=True),
    Case("Pad", "", (X3, i(0, 1, 0, 0, 1, 0)), passes=True),
    Case("Expand", "", (x(1, 1, 16), i(1, 8, 16)), passes=True),
    Case("Tile", "", (X3, i(1, 2, 1)), passes=True),
    Case("Squeeze", "", (x(1, 8, 1, 16), i(2)), passes=True),
    Case("Unsqueeze", "", (X3, i(1)), passes=True),
    Case("Flatten", "", (X3,), {"axis": 1}, passes=True),
    Case("Gather", "rows of a table", (c(32, 16), i(3, 1, 4, 1, shape=(1, 4))), passes=True),
    Case("Gather", "one place", (X3, i(0, shape=())), {"axis": 1}, passes=True),
    Case("GatherElements", "", (X3, i(*range(8), shape=(1, 8, 1))), {"axis": 1}, passes=True),
    Case("ScatterElements", "", (X3, i(*[2] * 16, shape=(1, 1, 16)), x(1, 1, 16)), {"axis": 1}),
    Case("ScatterND", "", (X3, i(0, 2, shape=(1, 1, 2)), x(1, 1, 16))),
    Case("Clip", "", (X3, Operand((), "constant", -0.5, -0.5), Operand((), "constant", 0.5, 0.5)), passes=True),
    Case("CumSum", "", (X3, i(1, shape=()))),
    Case("DepthToSpace", "", (x(1, 8, 4, 4),), {"blocksize": 2}, passes=True),
    Case("SpaceToDepth", "", (x(1, 2, 8, 8),), {"blocksize": 2}, passes=True),
    Case("Einsum", "", (X3, x(1, 16, 8)), {"equation": "bij,bjk->bik"}),
    Case("PRelu", "", (X3, c(16, low=0.1, high=0.3))),
    Case("ArgMax", "", (X3,), {"axis": -1, "keepdims": 0}, output="int64"),
    Case("TopK", "", (X3, i(4)), {"axis": -1}, passes=True),
    Case("Trilu", "", (x(8, 8),), passes=True),
    *(Case(name, "", (X3, x(1, 8, 16)), output="bool") for name in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    Case("Equal", "integers", (i(*range(8), shape=(1, 8)), i(*[3] * 8, shape=(1, 8))), output="bool"),
    *(Case(name, "", (b(1, 8, 16), b(1, 8, 16)), output="bool") for name in ("And", "Or", "Xor")),
    Case("Not", "", (b(1, 8, 16),), output="bool"),
    Case("Where", "two inputs", (b(1, 8, 16), X3, x(1, 8, 16))),
    Case("Where", "a number", (b(1, 8, 16), X3, Operand((), "constant", -0.5, -0.5))),
    Case("Cast", "integers to float", (i(*range(8), shape=(1, 8)),), {"to": 1}),
    Case("Identity", "", (X3,), passes=True),
)  # fmt: skip
