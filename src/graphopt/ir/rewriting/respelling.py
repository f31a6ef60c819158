"""Aliases of torch operators, and the name that programs use for each."""

from __future__ import annotations

from typing import Any

import torch

_NAMES = """
__and__ bitwise_and  __or__ bitwise_or  __xor__ bitwise_xor  __lshift__ bitwise_left_shift
__rshift__ bitwise_right_shift  absolute abs  arccos acos  arccosh acosh  arcsin asin  arcsinh asinh
arctan atan  arctan2 atan2  arctanh atanh  clip clamp  concat cat  concatenate cat  divide div  true_divide div
fix trunc  greater gt  greater_equal ge  less lt  less_equal le  moveaxis movedim  multiply mul  negative neg
not_equal ne  row_stack vstack  special_digamma digamma  special_erf erf  special_erfc erfc
special_erfinv erfinv  special_exp2 exp2  special_expit sigmoid  special_expm1 expm1  special_gammaln lgamma
special_i0 i0  special_log1p log1p  special_log_softmax log_softmax  special_logit logit
special_logsumexp logsumexp  special_polygamma polygamma  special_psi digamma  special_round round
special_sinc sinc  special_softmax softmax  special_xlogy xlogy  subtract sub  trapz trapezoid  ger outer
""".split()
SPELLINGS = dict(zip(_NAMES[::2], _NAMES[1::2], strict=True))
"""Aliases to the name that programs use; both take the same arguments and compute the same."""


def respelled(target: Any) -> Any | None:
    """Return the overload of the canonical name with the same arguments, or None where the operator has no alias."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    usual = SPELLINGS.get(target._schema.name.removeprefix("aten::"))
    if usual is None:
        return None
    packet = getattr(torch.ops.aten, usual)
    parameters = [(a.name, str(a.type)) for a in target._schema.arguments]
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if [(a.name, str(a.type)) for a in candidate._schema.arguments] == parameters:
            return candidate
    return None
