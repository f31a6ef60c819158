"""``program.module()``: cut into layers, trainable, apart from the user's model."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import nn

import graphopt


@pytest.fixture(scope="module")
def llama():
    model = zoo.make("llama")
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    return model, ids, graphopt.capture(model, {"input_ids": ids})


def test_names_blocks_and_gradients_are_the_models(llama) -> None:
    model, ids, program = llama
    module = program.module()
    assert set(dict(module.named_parameters())) == set(dict(model.named_parameters()))
    assert len(module.program_blocks()) == 2
    assert len({type(block) for block in module.program_blocks()}) == 1, (
        "equal layers must share code to compile once"
    )
    expected, found = model(input_ids=ids).logits, module(input_ids=ids).logits
    assert torch.allclose(expected, found, atol=1e-5)
    model.zero_grad()
    expected.square().mean().backward()
    found.square().mean().backward()
    gradients = {n: p.grad for n, p in module.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-6), f"the gradient of {name} differs"


def test_training_leaves_model_and_program_alone(llama) -> None:
    model, ids, program = llama
    before = copy.deepcopy(model.state_dict())
    expected = program(input_ids=ids).logits
    module = program.module()
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        logits = module(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    module.eval()
    assert losses[-1] < losses[0], "training the module does not learn"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), (
        "training changed the user's model"
    )
    assert torch.equal(expected, program(input_ids=ids).logits), "training changed the program"


def test_gradients_pass_through_fused_weights(llama) -> None:
    model, ids, program = llama
    module = graphopt.optimize(program, "fuse-projections").module()
    module(input_ids=ids).logits.square().mean().backward()
    query = module.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert query.grad is not None, "the original parameter is out of reach"
    assert float(query.grad.abs().sum()) > 0, "the original parameter is out of reach"
    folded = graphopt.optimize(program, "fuse-projections").module(fold_weights=True)
    assert any("q_k_v" in name for name, _ in folded.named_parameters())
    assert torch.allclose(folded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_deepcopy_and_state_dict(llama) -> None:
    _, ids, program = llama
    module = program.module()
    twin = copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(input_ids=ids).logits, module(input_ids=ids).logits)


def test_tied_weights_stay_tied() -> None:
    model = zoo.make("llama_tied")
    ids = torch.randint(5, 100, (2, 9))
    module = graphopt.capture(model, {"input_ids": ids}).module()
    assert module.get_parameter("lm_head.weight") is module.get_parameter("model.embed_tokens.weight")


def test_exported_program_has_no_operator_of_ours(llama) -> None:
    _, ids, program = llama
    exported = program.exported_program(core_aten=True)
    assert not [n for n in exported.graph.nodes if str(n.target).startswith("graphopt")]
    inputs = program.bind((), {"input_ids": ids})
    assert torch.allclose(exported.module()(**inputs)["logits"], program(input_ids=ids).logits, atol=1e-5)


@pytest.mark.slow
def test_blocks_compile(llama) -> None:
    _, ids, program = llama
    module = program.module()
    expected = module(input_ids=ids).logits
    for block in module.program_blocks():
        block.compile(dynamic=True, backend="aot_eager")
    assert torch.allclose(module(input_ids=ids).logits, expected, atol=1e-5)


def test_a_model_may_call_its_parts_as_it_likes() -> None:
    """Wrong if a name of the module's own, such as that of its list of blocks, is in the way."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.graph, self.program = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.relu(block(x))
            return self.program(self.graph(x))

    model, x = Named(), torch.randn(3, 4)
    module = graphopt.capture(model, x).module()
    assert set(module.state_dict()) == set(model.state_dict())
    assert torch.allclose(module(x), model(x))


def test_a_trained_module_becomes_a_program_again() -> None:
    """Wrong if training is lost on the way back, or if the program follows the module afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(5, 4)
    program = graphopt.capture(model, x)
    module = program.module()
    before = model(x).detach()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    trained = graphopt.capture(copy.deepcopy(module))
    expected = module(x).detach()
    assert torch.allclose(trained(x), expected, atol=1e-6)
    assert not torch.allclose(expected, before, atol=1e-3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert torch.allclose(trained(x), expected, atol=1e-6)
    assert torch.allclose(program(x), before, atol=1e-6), "the first program was trained too"
