"""The experts of a mixture-of-experts layer, after routing."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compat import is_plain_tensor
from ..schema import arguments
from .activations import activate
from .library import composite_operator
from .placement_types import PARTIAL, WHOLE, Joined, Misplaced, Placement, Shard, check_whole, placement_of
from .spec import OperatorSpec, Trait, like_first
from .work import ACTIVATION_FLOPS, Call, Work, minimum, moved, product


def _work(call: Call) -> Work:
    """FLOPs: tokens · k · (2 · elements of one expert's matrices + its activation + 2 · size to combine).

    Bytes: weights of min(tokens · k, experts) experts, the operands, the result, and the hidden values
    written and read once between the two products.
    """
    x, up, down = call.tensor("x"), call.tensor("up"), call.tensor("down")
    tokens, chosen = call.tensor("experts").shape
    rows = tokens * chosen
    experts = up.shape[0]
    inner = down.shape[1] if call.arguments.get("transposed") else down.shape[2]
    flops_per_channel = ACTIVATION_FLOPS + (1 if call.arguments.get("gated") else 0)
    matrices = product(up.shape[1:]) + product(down.shape[1:])
    flops = rows * (2 * matrices + flops_per_channel * inner + 2 * x.shape[-1])
    touched = minimum(rows, experts)
    stacked = ("up", "down", "up_bias", "down_bias")
    present = [name for name in stacked if call.arguments.get(name) is not None]
    work = moved(call, flops, {name: touched * product(call.tensor(name).shape[1:]) for name in present})
    hidden = 2 * rows * inner * x.dtype.itemsize
    return Work(work.flops, work.weight_bytes, work.activation_bytes + hidden)


def _place(node: fx.Node, placed: dict[fx.Node, Placement]) -> Placement:
    args = arguments(node)
    check_whole(placed, *(args[n] for n in ("x", "weights")))
    up, down = placement_of(args["up"], placed), placement_of(args["down"], placed)
    if isinstance(up, Joined) and len(set(up.pieces)) == 1:
        up = up.pieces[0]  # gate and up projection, sharded alike
    if up == WHOLE and down == WHOLE:
        return WHOLE
    if not (isinstance(up, Shard) and isinstance(down, Shard)):
        raise Misplaced(f"its first matrices are {up}, its second {down}")
    if args["down_bias"] is not None and up.dim != 0:
        raise Misplaced("its bias would be added once per rank; add it after the sum")
    return PARTIAL


@composite_operator(
    "routed_ffn(Tensor x, Tensor experts, Tensor weights, Tensor up, Tensor down, Tensor? up_bias=None, "
    'Tensor? down_bias=None, Tensor? first=None, *, str activation="silu", bool gated=True, bool interleaved=False, '
    "bool transposed=False, float limit=0.0, float alpha=1.0, bool weigh_inputs=False) -> Tensor",
    spec=OperatorSpec(shape=like_first, work=_work, place=_place, traits=Trait.MIXING),
)
def routed_ffn(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    first: Tensor | None = None,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float = 0.0,
    alpha: float = 1.0,
    weigh_inputs: bool = False,
) -> Tensor:
    """Return the sum of the chosen experts' outputs, each times its routing weight.

    Args:
        x: (tokens, size).
        experts: (tokens, k), integers: the experts each token goes to.
        weights: (tokens, k), the factor on each expert's output.
        up: (experts, inner or 2 * inner when gated, size); its last two dimensions swapped if ``transposed``.
        down: (experts, size, inner), likewise.
        up_bias: (experts, inner or 2 * inner).
        down_bias: (experts, size).
        first: (1,), the index of the first expert given, where other ranks have the others.
        activation: one of ``ACTIVATIONS``.
        gated: the first half of the up projection is the gate of the second.
        interleaved: gate and up channels alternate instead of filling one half each.
        transposed: expert matrices are stored input first.
        limit: clamp of swiglu_clamped and silu_clamped; cap on the gate of silu_softcapped.
        alpha: slope of swiglu_clamped; cap on the other half of silu_softcapped.
        weigh_inputs: weights are factors on the experts' inputs, as in Llama 4, instead of on their outputs.

    Returns:
        (tokens, size). Experts that are not among those given contribute nothing. Work is proportional to tokens
        times k where values are known; a traced graph gathers the experts' matrices instead, because its
        shapes may not depend on the routing.
    """

    def project(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rows, matrix.mT if transposed else matrix, bias)

    tokens, k = experts.shape
    if first is not None:
        experts = experts - first
    if is_plain_tensor(x) and is_plain_tensor(experts):
        out = torch.zeros(
            tokens, x.shape[1], dtype=torch.promote_types(x.dtype, weights.dtype), device=x.device
        )
        expert_ids = experts.reshape(-1)
        if first is not None:
            # indices of absent experts sort after all others
            expert_ids = expert_ids.where(
                (expert_ids >= 0) & (expert_ids < up.shape[0]), torch.full_like(expert_ids, up.shape[0])
            )
        order = torch.argsort(expert_ids, stable=True)
        counts = torch.bincount(expert_ids, minlength=up.shape[0])
        for expert, chosen in enumerate(torch.split(order, counts.tolist())):
            if chosen.numel() == 0 or expert >= up.shape[0]:
                continue
            token = chosen // k
            factor = weights.reshape(-1)[chosen, None]
            rows = x[token] * factor.to(x.dtype) if weigh_inputs else x[token]
            hidden = project(rows, up[expert], None if up_bias is None else up_bias[expert])
            hidden = activate(hidden, activation, gated, interleaved, limit, alpha)
            result = project(hidden, down[expert], None if down_bias is None else down_bias[expert])
            out.index_add_(0, token, (result if weigh_inputs else result * factor).to(out.dtype))
        return out.to(x.dtype)
    if first is not None:
        absent = (experts < 0) | (experts >= up.shape[0])
        weights = weights.masked_fill(absent, 0.0)
        experts = experts.clamp(0, up.shape[0] - 1)
    flat = experts.reshape(-1)
    rows = x.repeat_interleave(k, dim=0)
    factors = weights.reshape(-1, 1)
    if weigh_inputs:
        rows = rows * factors.to(x.dtype)
        # absent experts must contribute nothing, and their biases would
        factors = (
            torch.ones_like(factors) if first is None else absent.logical_not().to(x.dtype).reshape(-1, 1)
        )
    rows = rows.unsqueeze(1)

    def batched(inputs: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        chosen = matrices.index_select(0, flat)
        product = torch.bmm(inputs, chosen if transposed else chosen.mT)
        return product if bias is None else product + bias.index_select(0, flat).unsqueeze(1)

    hidden = activate(batched(rows, up, up_bias), activation, gated, interleaved, limit, alpha)
    result = batched(hidden, down, down_bias).squeeze(1) * factors
    return result.reshape(tokens, k, -1).sum(dim=1).to(x.dtype)
