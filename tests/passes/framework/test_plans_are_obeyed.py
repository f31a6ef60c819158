"""Every pass carries out the plan it is given: a plan cut to one site rewrites that site and no other."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from branch_networks import repvgg
from builders import Shape, Transformer, tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt import Program
from graphopt.ir.facts import TensorParallel
from graphopt.passes import Context, Plan, parse_pipeline
from graphopt.passes.framework.registry import BUILT_IN


def done(program: Program, text: str, **options: Any) -> Program:
    return graphopt.optimize(program, text, verify="off", **options)


@lru_cache
def decoder() -> Program:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    return graphopt.capture(LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(3, 32, (2, 6))})


@lru_cache
def norms() -> Program:
    return graphopt.capture(Transformer(Shape(width=16, norm="layer", bias=True)), tokens(2, 6))


@lru_cache
def images() -> Program:
    return graphopt.capture(repvgg(), torch.randn(2, 3, 8, 8))


@lru_cache
def sound() -> Program:
    pad = nn.ConstantPad1d((2, 0), 0.0)
    model = nn.Sequential(pad, nn.Conv1d(4, 4, 3), nn.ReLU(), pad, nn.Conv1d(4, 4, 3)).double().eval()
    return graphopt.capture(model, torch.randn(1, 4, 12, dtype=torch.float64))


@lru_cache
def mixture() -> Program:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return graphopt.capture(MixtralForCausalLM(config).eval(), {"input_ids": torch.randint(3, 32, (2, 6))})


DATA = [{"input_ids": torch.randint(3, 32, (2, 8), generator=torch.Generator().manual_seed(0))}]
HEADS = "attach-multi-token-heads{heads=1}, attach-early-exit{layers=[0]}"

CASES: dict[str, tuple[Callable[[], Program], Any]] = {
    "fuse-projections": (decoder, None),
    "split-projections": (lambda: done(decoder(), "fuse-projections"), None),
    "fold-norms": (norms, None),
    "fuse-branches": (images, None),
    "expand-branches": (images, None),
    "fit-target": (decoder, None),
    "quantize": (lambda: done(decoder(), "fit-target"), DATA),
    "quantize-weights{group=8}": (decoder, None),
    "dequantize-weights": (lambda: done(decoder(), "quantize-weights{group=8}"), None),
    "share-caches{start=1}": (decoder, DATA),
    "window-attention{past=3}": (decoder, None),
    "quantize-cache": (lambda: done(decoder(), "insert-cache"), None),
    "attach-early-exit{layers=[0 1]}": (decoder, None),
    "attach-mask-tokens{masks=1 rank=2}": (decoder, None),
    "trim-vocabulary{keep=20}": (lambda: done(decoder(), HEADS), None),
    "fuse-kernels": (decoder, None),
    "skip-layers{layers=[0 2]}": (decoder, None),
    "skip-layers{layers=[0 2] phase=decode}": (decoder, None),
    "dial-top-k": (mixture, None),
    "dial-top-k{per_layer=true}": (mixture, None),
    "prune-experts{fraction=0.25 score=random}": (mixture, None),
    "sort-ffn{score=random}": (decoder, None),
    "prune-ffn{fraction=0.5 score=random}": (decoder, None),
    "split-ffn{score=random}": (decoder, None),
    "extract-width{width=0.5}": (lambda: done(decoder(), "split-ffn{score=none}"), None),
    "shard-tensor-parallel{size=2}": (decoder, None),
    "group-heads{size=2}": (decoder, DATA),
    "drop-sync-points{fraction=1}": (lambda: done(decoder(), "shard-tensor-parallel{size=2}"), None),
    "quantize-communication{group=8 outliers=none}": (
        lambda: done(decoder(), "shard-tensor-parallel{size=2}"), None,
    ),
}  # fmt: skip
ONE_SITE = {
    "attach-multi-token-heads": (decoder, None),
    "attach-draft": (decoder, None),
    "take-top-k{output=logits k=4}": (decoder, None),
    "freeze-dial{value=1}": (lambda: done(decoder(), "split-ffn{score=none}"), None),
    "stream-convolutions": (sound, None),  # its sites are states that only together make a stream
    "insert-cache": (decoder, None),  # a plan with some of them is refused, in test_cache_plan.py
}


def test_every_pass_is_here() -> None:
    """Wrong if a new pass could ignore its plan."""
    tested = {text.partition("{")[0] for text in (*CASES, *ONE_SITE)}
    assert tested == set(BUILT_IN)


def planned(text: str) -> tuple[Program, Any, Plan]:
    make, data = (CASES | ONE_SITE)[text]
    program = make()
    (step,) = parse_pipeline(text)
    return program, step, step.plan(program, Context(data))


def rewritten(program: Program, step: Any, plan: Plan, sites: list[Any]) -> Program:
    copy = program.copy()
    copy.edit.author = step.name
    step.rewrite(copy, Plan(sites=sites, scores=dict(plan.scores)))
    return copy


def calls(program: Program) -> dict[str, str]:
    return {n.name: f"{n.target} {n.args} {n.kwargs}" for n in program.graph.nodes if n.op == "call_function"}


def changed(before: Program, after: Program) -> set[str]:
    """Names of the calls that are gone, or are made with other operands."""
    old, new = calls(before), calls(after)
    return {name for name, text in old.items() if new.get(name) != text}


def inside(program: Program, name: str) -> set[str]:
    """Names of the calls of a block, where a site is one."""
    blocks = {b.name: list(b.nodes) for b in program.anatomy.blocks}
    layers = {layer.name: [n for b in layer.blocks for n in b.nodes] for layer in program.anatomy.layers}
    return {n.name for n in (blocks | layers).get(name, [])}


@pytest.mark.parametrize("text", CASES)
def test_a_plan_cut_to_one_site_rewrites_that_site_and_no_other(text: str) -> None:
    """Wrong if a pass looked for its sites again, and took those that the plan leaves out."""
    program, step, plan = planned(text)
    assert len(plan.sites) > 1
    before = program.text()
    ends = [plan.sites[0], plan.sites[-1]]
    alone = [changed(program, rewritten(program, step, plan, [site])) for site in ends]
    both = changed(program, rewritten(program, step, plan, ends))
    outputs = {node.name for node in program.outputs.values()}
    for mine, other, site, left in zip(alone, alone[::-1], ends, ends[::-1], strict=True):
        after = rewritten(program, step, plan, [site])
        assert after.text() != before, f"{site.block} is not rewritten"
        if other and both != mine:
            assert not other <= mine, f"{left.block} is rewritten with {site.block}"
        gone = mine - calls(after).keys() - outputs
        assert not gone & inside(program, left.block), f"{left.block} loses calls with {site.block}"
        assert mine <= both
    texts = [rewritten(program, step, plan, sites).text() for sites in ([ends[0]], [ends[1]], ends)]
    assert len(set(texts)) == 3
    assert program.text() == before, "the program given was changed"


@pytest.mark.parametrize("text", [*CASES, *ONE_SITE])
def test_a_plan_without_sites_changes_nothing(text: str) -> None:
    """Wrong if what goes with a pass were done although nothing of it is wanted."""
    program, step, plan = planned(text)
    assert plan.sites
    after = rewritten(program, step, plan, [])
    assert after.text() == program.text()
    assert after.facts.kinds - program.facts.kinds <= {TensorParallel}
    assert after.dials == program.dials
    assert after.signature.inputs == program.signature.inputs
    assert {w.name for w in after.weights.values()} == {w.name for w in program.weights.values()}


@pytest.mark.parametrize(
    "text", ["prune-ffn{fraction=0.5 score=random}", "sort-ffn{score=random}", "split-ffn{score=random}"]
)
def test_projections_that_were_fused_stay_so_where_nothing_is_planned(text: str) -> None:
    """Wrong if blocks that the plan leaves out were taken apart, which costs them their speed."""
    program = done(decoder(), "fuse-projections")
    (step,) = parse_pipeline(text)
    plan = step.plan(program, Context())
    after = rewritten(program, step, plan, plan.sites[:1])
    assert inside(program, "attention.0") | inside(program, "ffn.2") <= {n.name for n in after.graph.nodes}
