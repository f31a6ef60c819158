"""Layers that are skipped after the prompt alone: what is lost is judged, measured and trained where it is lost."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from builders import Shape, Transformer, tokens
from torch import nn

import graphopt
from graphopt.ir.errors import PipelineError, UsageError
from graphopt.ir.export_blockers import export_blockers
from graphopt.ir.facts import SkippedWhileDecoding
from graphopt.passes import Context, SkipLayers
from graphopt.training import Settings
from graphopt.training.forms import CONTINUED, continued

SKIP = "skip-layers{layers=[1] phase=decode}"


def batches(count: int = 4, length: int = 9) -> list[dict[str, torch.Tensor]]:
    return [tokens(2, length, seed=s) for s in range(count)]


@lru_cache
def plain() -> graphopt.Program:
    return graphopt.capture(Transformer(Shape(layers=3, width=16)), tokens(2, 6))


@lru_cache
def phased() -> graphopt.Program:
    return graphopt.optimize(plain(), SKIP)


def removed() -> graphopt.Program:
    return graphopt.optimize(plain(), "skip-layers{layers=[1]}")


@pytest.mark.parametrize("how", ["layers=[1]", "speedup=1.5", "remove=1"])
def test_a_budget_holds_what_is_lost_after_the_prompt(how: str) -> None:
    """Wrong if any budget were held, since with the dial at its default nothing is lost."""
    data = batches()
    always = graphopt.optimize(plain(), f"skip-layers{{{how} metric=kl}}", data=data)
    assert always.report is not None
    lost = always.report.passes[-1].metric["kl"]
    done = graphopt.optimize(
        plain(), f"skip-layers{{{how} phase=decode metric=kl budget={lost * 1.01}}}", data=data
    )
    assert done.report is not None
    entry = done.report.passes[-1]
    assert entry.metric["kl at decoding=1"] == pytest.approx(lost, rel=1e-9)
    assert entry.metric["relative loss"] == pytest.approx(lost, rel=1e-9)
    assert entry.contract == "exact at decoding=0, judged at 1"
    with pytest.raises(graphopt.ContractError, match="at decoding=1, its budget is"):
        graphopt.optimize(
            plain(), f"skip-layers{{{how} phase=decode metric=kl budget={lost * 0.99}}}", data=data
        )
    with pytest.raises(PipelineError, match="budget has no effect: there is no data"):
        graphopt.optimize(plain(), f"skip-layers{{layers=[1] phase=decode budget={lost}}}")


def test_a_budget_alone_takes_as_many_as_hold_it() -> None:
    """Wrong if the search judged another function than the one that runs after the prompt."""
    data = batches()
    one = graphopt.optimize(plain(), "skip-layers{budget=1e9 metric=kl}", data=data)
    other = graphopt.optimize(plain(), "skip-layers{budget=1e9 metric=kl phase=decode}", data=data)
    assert one.report is not None
    assert other.report is not None
    assert one.report.passes[-1].sites == other.report.passes[-1].sites
    assert len(other.facts[SkippedWhileDecoding].names) == 2


def test_a_metric_of_the_users_sees_the_program_as_it_goes_on() -> None:
    """Wrong if it were given the program as it reads prompts."""
    row = batches(1)[0]
    seen = []

    def judged(program: graphopt.Program) -> float:
        seen.append(program(**row)["logits"])
        return 1.0

    graphopt.optimize(plain(), SKIP, evaluate=judged)
    assert torch.allclose(seen[0], removed()(**row)["logits"], atol=1e-10)
    assert torch.equal(seen[1], plain()(**row)["logits"])


def test_no_other_tool_removes_layers_after_the_prompt_alone() -> None:
    """Wrong if the report named commands that remove the layers for prompts too."""
    report = phased().report
    assert report is not None
    assert not any("llama" in note or "mergekit" in note for note in report.passes[-1].notes)
    always = removed().report
    assert always is not None
    assert any("llama.cpp" in note for note in always.passes[-1].notes)


def test_evaluation_reports_both_phases() -> None:
    """Wrong if a program that writes worse than it reads were told by how it reads."""
    data = batches()
    found = graphopt.evaluate(phased(), data, ["perplexity", "kl", lambda program: 3.0], against=plain())
    whole, fewer = (
        graphopt.evaluate(p, data, ["perplexity", "kl"], against=plain()) for p in (plain(), removed())
    )
    assert found.values["perplexity"] == whole.values["perplexity"]
    assert found.values["kl"] == 0.0
    for name in ("perplexity", "kl"):
        assert found.values[f"{name}_decoding"] == pytest.approx(fewer.values[name], rel=1e-9)
    assert list(found.values) == [
        "perplexity",
        "kl",
        "<lambda>",
        "perplexity_decoding",
        "kl_decoding",
        "<lambda>_decoding",
    ]
    assert not any("decoding" in name for name in whole.values)


@pytest.mark.parametrize("layers", ["[1]", "[0 2]"])
@pytest.mark.parametrize("unit", ["layer", "ffn"])
def test_a_sweep_counts_what_is_passed_over(layers: str, unit: str) -> None:
    """Wrong if the FLOPs of layers that no token takes were counted, or those of the prompt were not."""
    data = batches(2)
    options = f"layers={layers} unit={unit}"
    done = graphopt.optimize(plain(), f"skip-layers{{{options} phase=decode}}")
    read, written = graphopt.sweep(done, data, settings=[0, 1])
    shape = {"batch": 2, "sequence": 9}
    expected = [
        graphopt.cost(p, shape).flops / 18
        for p in (plain(), graphopt.optimize(plain(), f"skip-layers{{{options}}}"))
    ]
    assert [read.flops, written.flops] == pytest.approx(expected, rel=0.01)
    assert written.flops < read.flops
    assert (read.share, written.share) == (1.0, 0.0)


def test_training_with_the_dial_begins_at_the_loss_that_evaluation_reports() -> None:
    """Wrong if fine-tuning for skipped layers trained the whole model."""
    data = batches(1)
    settings = Settings(steps=12, learning_rate=2e-3, schedule="constant")
    done, record = graphopt.train(phased(), "language{dial=1}", data, settings, device="cpu")
    before, after = (graphopt.evaluate(p, data, ["perplexity"]).values for p in (phased(), done))
    assert record.losses[0] == pytest.approx(math.log(before["perplexity_decoding"]), rel=1e-5)
    assert after["perplexity_decoding"] < before["perplexity_decoding"]
    _, whole = graphopt.train(phased(), "language", data, settings, device="cpu")
    assert whole.losses[0] == pytest.approx(math.log(before["perplexity"]), rel=1e-5)


@pytest.mark.parametrize(("length", "prompt"), [(9, 4), (6, 1), (6, 5)])
def test_a_row_of_prompt_and_continuation_computes_what_decoding_computes(
    captured, length: int, prompt: int
) -> None:
    """Wrong if training saw other keys and values after a prompt than generation does."""
    from graphopt.decoding.cached import CachedDecoder
    from graphopt.decoding.generation import with_cache
    from graphopt.ir.running.retype import retyped

    wide = retyped(captured("llama"), torch.float64)
    done = graphopt.optimize(wide, "skip-layers{layers=[1] phase=decode}")
    row = torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(3))
    marks = torch.arange(length)[None] >= prompt
    said = continued(done)(input_ids=row, **{CONTINUED: marks})["logits"]
    decoder = CachedDecoder(with_cache(done), 1, length)
    found = [decoder.prefill([row[0, :prompt].tolist()])[0]["logits"].reshape(-1)]
    decoder.decoding = True
    for place in range(prompt, length):
        found.append(decoder.extend(row[:, place : place + 1])["logits"][0, -1])
        decoder.advance([1])
    assert torch.allclose(torch.stack(found), said[0, prompt - 1 :], atol=1e-9)
    with pytest.raises(UsageError, match="decoder itself sets"):
        graphopt.generate(done, row, max_new_tokens=1, dials={"decoding": 0.0})
    assert not torch.allclose(said[0, prompt:], wide(input_ids=row)["logits"][0, prompt:], atol=1e-3)


def test_training_on_prompts_and_continuations() -> None:
    """Wrong if one part of a row were read as the other, padding counted, or a program without phases were taken."""
    from graphopt.training.recipes import find_method

    data = [
        {"input_ids": tokens(2, 8)["input_ids"], "attention_mask": torch.tensor([[1] * 8, [0] * 4 + [1] * 4])}
    ]
    recipe = find_method("language", {"prompt": 0.5}).recipe(phased())
    marks = recipe.transform(data[0])[CONTINUED]
    assert (marks & data[0]["attention_mask"].bool()).tolist() == [
        [False] * 4 + [True] * 4,
        [False] * 6 + [True] * 2,
    ]
    settings = Settings(steps=8, learning_rate=2e-3, schedule="constant")
    done, record = graphopt.train(phased(), "language{prompt=0.5}", batches(1), settings, device="cpu")
    assert record.losses[-1] < record.losses[0]
    assert done.dials == phased().dials
    assert done.signature.inputs.keys() == phased().signature.inputs.keys()
    for share, phase in ((1.0, "perplexity"), (0.0, "perplexity_decoding")):
        _, ends = graphopt.train(
            phased(), f"language{{prompt={share}}}", batches(1), Settings(steps=1), device="cpu"
        )
        assert ends.losses[0] == pytest.approx(
            math.log(graphopt.evaluate(phased(), batches(1), ["perplexity"]).values[phase]), rel=1e-5
        )
    with pytest.raises(UsageError, match="skips no layers after a prompt"):
        find_method("language", {"prompt": 0.5}).recipe(plain())
    with pytest.raises(PipelineError, match="dial=1 has no effect beside prompt="):
        find_method("language", {"prompt": 0.5, "dial": 1.0})


@pytest.mark.parametrize("value", [0, 1])
def test_a_phase_that_is_frozen_stays(captured, value: int) -> None:
    """Wrong if a program that was told to take all layers always went on to pass them over after the prompt."""
    whole = captured("llama")
    done = graphopt.optimize(whole, "skip-layers{layers=[1] phase=decode}")
    frozen = graphopt.optimize(done, f"freeze-dial{{value={value}}}")
    expected = whole if value == 0 else graphopt.optimize(whole, "skip-layers{layers=[1]}")
    row = torch.randint(3, 100, (1, 7), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(frozen(input_ids=row)["logits"], expected(input_ids=row)["logits"], atol=1e-5)
    texts = [graphopt.generate(p, row, max_new_tokens=8) for p in (frozen, expected)]
    assert torch.equal(*texts)
    assert bool(export_blockers(frozen)) == (value == 1)


class Beside(nn.Module):
    """Layers of two feed-forwards of one input, which are added together, or apart and the first of them twice."""

    def __init__(self, together: bool):
        super().__init__()
        self.together = together
        self.table, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(8), *(self.ffn(kind) for kind in (nn.GELU, nn.ReLU))])
            for _ in range(3)
        )

    @staticmethod
    def ffn(activation: type[nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 8))

    def forward(self, input_ids: torch.Tensor, without: tuple[tuple[int, int], ...] = ()) -> torch.Tensor:
        x = self.table(input_ids)
        for number, (norm, *branches) in enumerate(self.layers):
            first, second = (branch(norm(x)) for branch in branches)
            first, second = (
                torch.zeros_like(y) if (number, place) in without else y
                for place, y in enumerate((first, second))
            )
            x = x + (first + second) if self.together else x + first + second + first
        return self.head(x)


@lru_cache
def beside(together: bool) -> tuple[Beside, graphopt.Program]:
    torch.manual_seed(0)
    model = Beside(together).double().eval()
    return model, graphopt.capture(model, {"input_ids": torch.randint(0, 32, (2, 6))})


def test_two_that_are_one_addition_are_not_both_skipped() -> None:
    """Wrong if both were planned, and the one that is added to the other went on as if it were the stream."""
    model, program = beside(together=True)
    step = SkipLayers(layers=[0, 1, 3], unit="ffn", phase="decode")
    plan = step.plan(program, Context())
    assert [s.block for s in plan.sites] == ["ffn.0", "ffn.3"]
    (reason,) = (r.reason for r in plan.refused if r.block == "ffn.1")
    assert reason == "nothing but ffn.0, which is skipped, is added with it"
    done, ids = graphopt.optimize(program, str(step)), tokens(2, 6)["input_ids"]
    setting = torch.tensor(1.0)
    assert torch.allclose(done(input_ids=ids, decoding=setting), model(ids, ((0, 0), (1, 1))), atol=1e-12)
    plan.sites = step.findings(program).sites[:2]
    with pytest.raises(graphopt.PassRefusedError, match="takes ffn.1, which cannot be taken: nothing but"):
        step.rewrite(program.copy(), plan)


@pytest.mark.parametrize(
    "how", ["layers=[0 2]", "speedup=2", "remove=1", "remove=3", "budget=9", "remove=1 search=contiguous"]
)
def test_what_cannot_be_skipped_is_refused_while_planning(how: str) -> None:
    """Wrong if a plan or a search took units that carrying the plan out would refuse."""
    model, program = beside(together=False)
    data = [{"input_ids": row["input_ids"]} for row in batches()]
    done = graphopt.optimize(program, f"skip-layers{{unit=ffn phase=decode {how}}}", data=data)
    assert done.report is not None
    entry = done.report.passes[-1]
    taken = [int(name.removeprefix("ffn.")) for name in entry.sites]
    # each first feed-forward is two blocks, one for each time it is added
    assert taken and set(taken) <= {2, 5, 8} and not any(r.rolled_back for r in entry.refused)
    reasons = {r.block: r.reason for r in entry.refused}
    assert "not added to the stream apart" in reasons["ffn.0"]
    found = done(**data[0], decoding=torch.tensor(1.0))
    expected = model(data[0]["input_ids"], tuple((number // 3, 1) for number in taken))
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("how", ["remove=4", "remove=2 search=contiguous", "layers=[0 1]"])
def test_no_more_are_skipped_than_can_be(how: str) -> None:
    """Wrong if neighbours were taken that are none, or as many as there are blocks of whatever kind."""
    _, program = beside(together=False)
    with pytest.raises(graphopt.PassRefusedError, match="3 can be skipped|not added to the stream apart"):
        graphopt.optimize(
            program,
            f"skip-layers{{unit=ffn phase=decode {how}}}",
            data=[{"input_ids": row["input_ids"]} for row in batches()],
        )
