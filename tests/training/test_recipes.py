"""Recipes: what is learned, what stays, and that labels, budgets and random ways are what the papers say."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from builders import Shape, Transformer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

import graphopt
from graphopt.ir.errors import PipelineError, UsageError
from graphopt.ir.program import Program
from graphopt.measure.choices import nested_blocks, widths_of_choices, with_choices_as_input
from graphopt.training import Settings
from graphopt.training.forms import router_weights, shown_routers, soft_choices, soft_experts, with_weights
from graphopt.training.recipes import METHODS, PHDS, DuoDistil, DuoRouters, DynaMoE, difficulty, find_method

composites = torch.ops.graphopt


@lru_cache(maxsize=8)
def split(text: str = "score=peak") -> Program:
    program = graphopt.capture(Transformer(Shape(width=16)), tokens(2, 6))
    return graphopt.optimize(program, f"split-ffn{{{text}}}")


DUO = "score=peak widths=[1/4 1] separate=true"


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [tokens(2, 8, seed=s) for s in range(count)]


def weights_of(program: Program) -> dict[str, torch.Tensor]:
    return {w.name: w.source.load() for w in program.weights.values() if w.kind == "parameter"}


@given(st.lists(st.floats(-1, 2), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1))
def test_labels_are_the_narrowest_that_is_alike(similar, first, second) -> None:
    row = torch.tensor([[*similar, 1.0]], dtype=torch.float64)
    low, high = sorted((first, second))

    def by_hand(theta: float) -> int:
        return next((i for i, s in enumerate(similar) if s > theta), len(similar))

    assert int(difficulty(row, low)) == by_hand(low)
    assert int(difficulty(row, low)) <= int(difficulty(row, high)), "more is asked for, and a token gets less"
    assert int(difficulty(row, 1.0)) == by_hand(1.0)


def test_the_whole_is_a_label_whatever_theta_is() -> None:
    assert int(difficulty(torch.tensor([0.1, 0.2, 1.0]), 1.0)) == 2


RECIPES = [
    ("language", "score=peak", lambda n, r: True),
    ("dynamoe", "score=peak", lambda n, r: True),
    ("dynamoe{train=routers}", "score=peak", lambda n, r: n in r),
    ("duo-distil", DUO, lambda n, r: n not in r),
    ("duo-distil{skip=0.3 train=small}", DUO + " skip=true", lambda n, r: ".small_" in n),
    ("duo-distil{distil=0 language=1}", "score=peak", lambda n, r: n not in r),
    ("duo-routers", DUO, lambda n, r: n in r),
    ("duo-routers{target=0.2}", "score=peak", lambda n, r: n in r),
]


@pytest.mark.parametrize(("recipe", "options", "trains"), RECIPES)
def test_what_is_trained_moves_and_nothing_else_does(recipe: str, options: str, trains) -> None:
    program = split(options)
    before = weights_of(program)
    done, record = graphopt.train(
        program, recipe, batches(), Settings(steps=3, learning_rate=1e-2, schedule="constant"), device="cpu"
    )
    routers = router_weights(program)
    after = weights_of(done)
    assert record.step == 3
    assert set(after) == set(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    allowed = {name for name in before if trains(name, routers)}
    assert moved
    assert moved <= allowed
    expected = {n for n in allowed if "router" in n or "think" in n}
    if recipe.startswith(("dynamoe", "duo")):
        assert moved & expected
    assert weights_of(program).keys() == before.keys()
    assert all(torch.equal(before[n], t) for n, t in weights_of(program).items()), (
        "the program given was changed"
    )
    assert done.dials == program.dials, "the form's inputs and outputs must not stay"
    assert done.signature.output_names == program.signature.output_names
    assert str(done.history[-1]["recipe"]).partition("{")[0] == recipe.partition("{")[0]


def test_every_recipe_is_tested_and_described() -> None:
    # the others stand in test_multi_token.py, test_attached_draft.py, test_mask_tokens.py and test_r2.py
    tested = {text.partition("{")[0] for text, _, _ in RECIPES} | {
        "phds",
        "medusa",
        "draft",
        "mask-tokens",
        "r2",
    }
    assert tested == set(METHODS)
    for method in METHODS.values():
        assert (method.__doc__ or "").strip()
        assert all(help_ for *_, help_ in method.describe())


def test_forms_compute_what_the_program_computes() -> None:
    """Given the choices that the dial would make, or told to be sure of them, a form is the program."""
    program = split()
    inputs = tokens(2, 9, seed=5)
    expected = program(**inputs)["logits"]
    layers = len(nested_blocks(program))
    routing = torch.full((layers, 2, 9), 3)
    assert torch.allclose(
        with_choices_as_input(program)(**inputs, routing=routing)["logits"], expected, atol=1e-12
    )
    shown = shown_routers(program)(**inputs)
    assert shown["router_logits"].shape == (layers, 2, 9, 4) == shown["similarity"].shape
    # routers without preference: the likeliest is the first
    narrow = with_choices_as_input(program)(**inputs, routing=torch.zeros_like(routing))["logits"]
    assert torch.allclose(shown["logits"], narrow, atol=1e-12)
    soft = soft_choices(program)(**inputs, temperature=0.5)
    assert torch.allclose(soft["shares"], torch.full((layers, 2, 9, 4), 0.25, dtype=torch.float64))
    assert widths_of_choices(nested_blocks(program)[0]) == [4, 8, 12, 16]


def test_soft_ways_become_hard_as_they_cool() -> None:
    from preferring_routers import with_preferences

    program = with_preferences(split(DUO))
    inputs = tokens(2, 9, seed=5)
    hard = program(**inputs, delta=0.5)["logits"]
    errors = [
        float((soft_choices(program)(**inputs, temperature=t)["logits"] - hard).abs().max())
        for t in (1.0, 1e-3)
    ]
    assert errors[1] < 1e-9 < errors[0]


def test_random_ways_are_as_likely_as_asked() -> None:
    program = split(DUO + " skip=true")
    for skip, expected in ((0.0, [0.0, 0.5, 0.5]), (0.4, [0.4, 0.3, 0.3])):
        recipe = DuoDistil(skip=skip, distil=0.0, language=1.0).recipe(program)
        torch.manual_seed(0)
        drawn = recipe.transform({"input_ids": torch.zeros(40, 50, dtype=torch.long)})["routing"]
        shares = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
        assert torch.allclose(shares, torch.tensor(expected), atol=0.03)
        torch.manual_seed(0)
        again = recipe.transform({"input_ids": torch.zeros(40, 50, dtype=torch.long)})["routing"]
        assert torch.equal(drawn, again), "a resumed run would draw other ways"


def test_budget_is_one_for_the_whole_model() -> None:
    """Layers may differ, as long as the mean is right: the gradient of the budget is the same for every token."""
    program = split(DUO)
    recipe = DuoRouters(target=0.5, weight=1.0).recipe(program)
    module = recipe.module()
    batch = recipe.transform(tokens(2, 8), 0.0)
    assert float(batch["temperature"]) == pytest.approx(2.0)
    assert float(recipe.transform(tokens(2, 8), 1.0)["temperature"]) == pytest.approx(0.2)
    at_target = recipe.loss(module, batch)
    away = DuoRouters(target=0.1, weight=1.0).recipe(program)
    assert float(away.loss(away.module(), batch)) - float(at_target) == pytest.approx(0.4**2, abs=1e-6)


def test_routers_learn_the_labels() -> None:
    program = split()
    recipe = "dynamoe{theta=0.6 train=routers}"
    done, record = graphopt.train(
        program, recipe, batches(), Settings(steps=80, learning_rate=3e-2), device="cpu"
    )
    assert record.losses[-1] < 0.7 * record.losses[0]
    shown = shown_routers(done)(**batches()[0])
    labels = difficulty(shown["similarity"], 0.6)
    right = (shown["router_logits"].argmax(-1) == labels).double().mean()
    commonest = torch.bincount(labels.flatten()).max() / labels.numel()
    assert right >= commonest, "a router that always says the same would do as well"


def mixture(captured) -> Program:
    return graphopt.optimize(captured("olmoe"), "dial-top-k")


def test_soft_mask_becomes_hard(captured) -> None:
    program = mixture(captured)
    ids = {"input_ids": torch.randint(3, 100, (2, 7))}
    hard = program(**ids, active_experts=1)["logits"]
    errors = []
    for epsilon in (1e-2, 1e-4, 0.0):
        soft = soft_experts(program, epsilon)
        errors.append(float((soft(**ids, active_experts=1)["logits"] - hard).abs().max()))
        assert torch.allclose(soft(**ids, active_experts=2)["logits"], program(**ids)["logits"], atol=1e-6)
    assert errors[2] < 1e-6 < errors[1] < errors[0]


@given(st.integers(1, 4), st.booleans(), st.floats(1e-8, 1e-2))
@settings(max_examples=20, deadline=None)
def test_softened_weights(k: int, renormalised: bool, epsilon: float) -> None:
    weights = torch.rand(5, 4, dtype=torch.float64).sort(-1, descending=True).values
    found = composites.softened_weights(
        weights, torch.tensor(float(k), dtype=torch.float64), renormalised, epsilon
    )
    if renormalised:
        assert torch.allclose(found.sum(-1), weights.sum(-1))
    else:
        assert torch.equal(found[:, :k], weights[:, :k])
        assert bool((found[:, k:] == epsilon).all())


def test_numbers_of_experts_are_drawn_and_the_anchor_comes_late(captured) -> None:
    program = mixture(captured)
    recipe = PHDS(anchor=1, anchor_from=0.5).recipe(program)
    torch.manual_seed(0)
    early = [int(recipe.transform(tokens(1, 4), 0.1)["active"]) for _ in range(200)]
    late = [int(recipe.transform(tokens(1, 4), 1.0)["active"]) for _ in range(50)]
    assert 60 < early.count(1) < 140
    assert set(late) == {1}
    done, record = graphopt.train(
        program,
        "phds{anchor=1}",
        [{"input_ids": torch.randint(3, 100, (2, 8))}],
        Settings(steps=2),
        device="cpu",
    )
    assert record.step == 2
    assert done.dials == program.dials


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("dynamo", "did you mean 'dynamoe'"),
        ("dynamoe{thetta=1}", "did you mean 'theta'"),
        ("dynamoe{theta=1.2}", "allowed is from 0 to 1"),
        ("dynamoe{theta=-0.1}", "allowed is from 0 to 1"),
        ("dynamoe{train=half}", "choose one of"),
        ("duo-distil{distil=0 language=0}", "nothing to learn"),
        ("dynamoe, language", "one recipe"),
        ("", "a recipe"),
        ("phds", "dial-top-k first"),
    ],
)
def test_wrong_recipes_are_explained(recipe: str, reason: str) -> None:
    with pytest.raises((PipelineError, UsageError), match=reason):
        graphopt.train(split(), recipe, batches(), Settings(steps=1), device="cpu")


def test_programs_that_a_recipe_cannot_train_are_refused(captured) -> None:
    plain = captured("llama")
    for method in (DynaMoE(), DuoDistil(), DuoRouters()):
        with pytest.raises(UsageError, match="split-ffn first"):
            method.recipe(plain)
    with pytest.raises(UsageError, match="without separate=true"):
        DynaMoE().recipe(split(DUO))
    with pytest.raises(UsageError, match="from 1 to the trained 2"):
        find_method("phds", {"among": [1, 3]}).recipe(mixture(captured))
    with pytest.raises(UsageError, match="no data"):
        graphopt.train(split(), "language", [], Settings(steps=1))
    with pytest.raises(UsageError, match="nothing of this program"):
        DuoDistil(train="small").recipe(split()).module()


def test_any_loop_trains_what_split_ffn_made(captured, capsys: pytest.CaptureFixture[str]) -> None:
    """The example's plain loop and transformers' Trainer; and ``program.module()`` as it is."""
    import sys

    sys.path.insert(0, str(ROOT / "examples"))
    from train_experts import plain_loop, trainer

    program = graphopt.optimize(captured("llama"), "split-ffn{score=peak}")
    rows = [
        {"input_ids": torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(s))}
        for s in range(2)
    ]
    recipe = DynaMoE(train="routers").recipe(program)
    routers = router_weights(program)
    for loop in (plain_loop, trainer):
        done = recipe.finish(program, loop(recipe, rows, 3))
        before, after = weights_of(program), weights_of(done)
        assert {n for n in before if not torch.equal(before[n], after[n])} <= routers
        assert any(not torch.equal(before[n], after[n]) for n in routers)
    module = program.module()
    module(input_ids=rows[0]["input_ids"], delta=0.5)["logits"].square().mean().backward()
    touched = {n for n, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert touched
    assert not touched & routers, "the choice is hard: no gradient goes through it"


def test_sixteen_bits_learn_in_thirty_two(tmp_path) -> None:
    """A step of 1e-4 is lost on a bfloat16 of size one; the sum of many must not be."""
    import zoo

    zoo.make("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    program = graphopt.capture(tmp_path)
    ids = [{"input_ids": torch.randint(3, 100, (2, 8))}]
    settings_ = Settings(steps=40, learning_rate=1e-4, schedule="constant")
    moved = {}
    for dtype in ("float32", "stored"):
        done, _ = graphopt.train(program, "language", ids, settings_, device="cpu", dtype=dtype)
        before, after = weights_of(program), weights_of(done)
        assert {t.dtype for t in after.values()} == {t.dtype for t in before.values()}
        norms = [n for n in before if "norm" in n]
        moved[dtype] = sum(int((before[n] != after[n]).sum()) for n in norms)
    assert moved["float32"] > 2 * moved["stored"]
    with pytest.raises(UsageError, match="float32 or stored"):
        graphopt.train(program, "language", ids, settings_, dtype="float8")


def test_a_folder_belongs_to_one_run(tmp_path) -> None:
    """Equal weights in another graph are another program; an attempt that trained nothing leaves the folder free."""
    short = Settings(steps=2, schedule="constant")
    plain = graphopt.capture(Transformer(Shape(width=16)), tokens(2, 6))
    with pytest.raises(UsageError, match="split-ffn first"):
        graphopt.train(plain, "dynamoe", batches(), short, device="cpu", work_dir=tmp_path)
    graphopt.train(split(), "dynamoe", batches(), short, device="cpu", work_dir=tmp_path)
    other = split("score=peak widths=[1/8 1/2 3/4 1]")
    with pytest.raises(UsageError, match="another program"):
        graphopt.train(other, "dynamoe", batches(), short, device="cpu", work_dir=tmp_path)


class Flat(torch.nn.Module):
    """Feed-forwards that see the tokens of all rows one after the other, as GPT-2's once did."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(17, 8)
        self.up = torch.nn.ModuleList(torch.nn.Linear(8, 16) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(16, 8) for _ in range(2))
        self.norm = torch.nn.ModuleList(torch.nn.LayerNorm(8) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        for up, down, norm in zip(self.up, self.down, self.norm, strict=True):
            flat = norm(x).reshape(-1, 8)
            x = x + down(torch.relu(up(flat))).reshape(x.shape)
        return {"logits": x @ self.embed.weight.T}


@pytest.mark.parametrize("recipe", ["dynamoe", "duo-distil", "duo-routers"])
def test_feed_forwards_on_flattened_tokens_are_trained_alike(recipe: str) -> None:
    program = graphopt.capture(Flat(), {"input_ids": torch.randint(0, 17, (3, 5))})
    done = graphopt.optimize(program, "split-ffn{score=peak widths=[1/4 1]}")
    assert done.anatomy.ffn[0].parts["choice"].meta["val"].dim() == 1, "this test is about flattened tokens"
    rows = [{"input_ids": torch.randint(0, 17, (2, 6))}]
    _, record = graphopt.train(done, recipe, rows, Settings(steps=2), device="cpu")
    assert record.step == 2
    shown = shown_routers(done)(**rows[0])
    assert shown["similarity"].shape == (2, 2, 6, 2)


def test_weights_go_back_by_name() -> None:
    program = split()
    module = program.module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    done = with_weights(program, module)
    for name, tensor in weights_of(program).items():
        assert torch.equal(weights_of(done)[name], tensor + 1)
