"""What the processor at hand computes in another way than files say."""

from __future__ import annotations

import functools

LENGTH, LARGEST = 64, (255, 127)
"""A sum of products of unsigned and signed bytes that does not fit into sixteen bits by pairs."""


@functools.cache
def sums_overflow() -> bool:
    """Return whether ONNX Runtime's sums of products of unsigned and signed bytes overflow on this processor.

    On x86 processors without VNNI instructions, pairs of products are added in sixteen bits, which saturate (ONNX
    Runtime's documentation of quantisation, section "when to use reduce-range"; seen with 1.31.1 on an AMD EPYC).
    """
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    unsigned, signed = LARGEST
    weights = helper.make_tensor("b", TensorProto.INT8, [LENGTH, 8], [signed] * (8 * LENGTH))
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "sum",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [1, LENGTH])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 8])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((1, LENGTH), unsigned, dtype=np.uint8)})
    return int(found[0, 0]) != unsigned * signed * LENGTH
