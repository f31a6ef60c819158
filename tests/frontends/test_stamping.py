"""Capture by stamping gives the graph of a full export, and notices whatever differs between layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import zoo
from amounts import cases
from safetensors.torch import load_file, save_file
from same_graph import both, require_same
from torch import nn

import graphopt
from graphopt.frontends import huggingface
from graphopt.frontends.stamping import plan as stamping
from graphopt.frontends.stamping.record import CannotStamp, record
from graphopt.ir.errors import CheckpointError
from graphopt.ir.facts import Capture

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")  # fmt: skip
USUAL = ("llama_tied", "gemma3", "gpt2", "falcon", "t5", "mixtral", "vit")
# where five layers are enough for some to be copied; layers that alternate take more
FIVE = ("llama_tied", "gemma3", "gpt2", "t5", "mixtral")


def deep(name: str) -> Any:
    """Return a configuration of the zoo with five or seven layers."""
    case = zoo.CASES[name]
    depths = {n: 5 if name in FIVE else 7 for n in DEPTHS if n in case.options}
    config = getattr(transformers, case.config)(**{**case.options, **depths})
    config.architectures = [case.model]
    return config


@pytest.mark.parametrize("name", cases(USUAL, [name for name in zoo.CASES if name not in USUAL]))
def test_stamped_and_full_are_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = deep(name)
    stamped, full = both(lambda: huggingface.capture_configuration(config), monkeypatch)
    if name in USUAL:
        assert "copied" in stamped.facts[Capture].layers, stamped.facts[Capture].layers
    require_same(stamped, full)
    assert stamped.anatomy.summary() == full.anatomy.summary()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama_tied"])
def test_folders_bind_the_same_tensors(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are made from several tensors of a file, whose keys are numbered in their own way."""
    config = deep(name)
    torch.manual_seed(0)
    getattr(transformers, zoo.CASES[name].model)(config).save_pretrained(tmp_path)
    stamped, full = both(lambda: graphopt.capture(tmp_path), monkeypatch)
    assert "copied" in stamped.facts[Capture].layers
    require_same(stamped, full)


@pytest.mark.parametrize("compare", [True, False])
def test_a_tensor_that_one_layer_lacks_is_named(compare: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(deep("llama_tied")).save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.4.mlp.up_proj.weight"
    tensors = {key: value for key, value in load_file(path).items() if key != name}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"no tensor for {name}"):
        graphopt.capture(tmp_path, compare=compare, cache=False)


def test_models_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(deep("gpt2"))
    before = dict(model.named_modules())
    ids = torch.randint(0, 101, (2, 9))
    stamped, full = both(lambda: graphopt.capture(model, {"input_ids": ids}), monkeypatch)
    assert "copied" in stamped.facts[Capture].layers
    require_same(stamped, full)
    assert dict(model.named_modules()) == before, "a layer that was left out was not put back"
    assert stamped.weight_of(
        stamped.weight_node("transformer.h.4.mlp.c_fc.weight")
    ).source.load().data_ptr() == (model.transformer.h[4].mlp.c_fc.weight.data_ptr())


# -- what may differ between layers ---------------------------------------------------------------------


class Layer(nn.Module):
    """A residual feed-forward layer; ``change`` alters one of several things."""

    def __init__(self, number: int, change: str):
        super().__init__()
        changed = number >= 4
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 24 if change == "width" and changed else 16)
        self.down = nn.Linear(self.up.out_features, 8, bias=not (change == "bias" and changed))
        self.number, self.change = number, change
        self.scale = 2.0 if change == "scalar" and changed else 1.5
        self.register_buffer("table", torch.full((8,), 1.0 + (changed and change == "buffer")))
        self.plain = torch.full((8,), 1.0 + (changed and change == "attribute"))
        self.order = [1, 0, *range(2, 8)] if change == "index" and changed else list(range(8))
        self.up.weight.requires_grad_(not (change == "frozen" and changed))
        self.activation = torch.relu if change == "operator" and changed else torch.tanh

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.activation(self.up(self.norm(x)))) * self.scale * self.table * self.plain
        if self.change == "tensor":
            y = y * torch.tensor(float(self.number >= 4) + 1)
        return x + y[..., self.order]


class Stack(nn.Module):
    def __init__(self, change: str, layers: int = 7):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList(Layer(n, change) for n in range(layers))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


CHANGES = ("scalar", "buffer", "attribute", "index", "operator", "tensor", "width", "bias", "frozen")


@pytest.mark.parametrize("change", ["nothing", *CHANGES])
def test_what_sets_in_late_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two layers are equal in all of them, so that only the record of all layers can tell."""
    torch.manual_seed(0)
    model, x = Stack(change).double(), torch.randn(3, 4, dtype=torch.float64)
    kinds = {layer.key for layer in record(model, {"x": x}).layers}
    assert len(kinds) == (1 if change == "nothing" else 2), f"{change} was not noticed, or something else was"
    stamped, full = both(lambda: graphopt.capture(model, x), monkeypatch)
    torch.testing.assert_close(stamped(x), model(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stamped(x), full(x), rtol=0, atol=0)


def test_each_layer_its_own_kind_is_exported_whole() -> None:
    config = transformers.GPT2Config(
        vocab_size=101, n_embd=32, n_layer=6, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True
    )
    program = huggingface.capture_configuration(config)
    assert program.facts[Capture].layers == "all exported: its 6 layers are of 6 kinds"


class Called(nn.Module):
    """A list of layers, called in an unusual way."""

    def __init__(self, order: tuple[int, ...], back: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(Layer(0, "nothing") for _ in range(5))
        self.order, self.back = order, back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for number in self.order:
            x = self.layers[number](x)
            first = x if number == 1 else first
        return x + first if self.back else x


@pytest.mark.parametrize(
    ("order", "back", "reason"),
    [
        ((0, 1, 2, 3, 4, 4), False, "not called once each and in order"),
        ((1, 0, 2, 3, 4), False, "not called once each and in order"),
        ((0, 1, 2, 3, 4), True, ""),
    ],
)
def test_lists_called_otherwise(order: tuple[int, ...], back: bool, reason: str) -> None:
    torch.manual_seed(0)
    model, x = Called(order, back).double(), torch.randn(3, 8, dtype=torch.float64)
    program = graphopt.capture(model, x)
    if reason:
        assert reason in program.facts[Capture].layers
    torch.testing.assert_close(program(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_run_that_fails_leaves_the_model_as_it_was() -> None:
    class Asking(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * float(x.sum().item() > 0)

    torch.manual_seed(0)
    model, x = Asking("nothing"), torch.randn(3, 4)
    tensors = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    reason = stamping.plan_stamping(model, {"x": x})
    assert isinstance(reason, CannotStamp)
    assert "without values" in reason.message
    assert {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())} == tensors
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Remembering(Layer):
    """Keeps a table for the next call in an attribute, in a dictionary, and as a buffer that it registers."""

    def __init__(self) -> None:
        super().__init__(0, "nothing")
        self.kept: torch.Tensor | None = None
        self.tables: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = torch.ones(8, dtype=x.dtype, device=x.device)
            self.tables[8] = self.kept
            self.register_buffer("late", self.kept)
        return super().forward(x) * self.kept * self.tables[8] * self.late


def test_what_a_recorded_run_assigns_is_undone() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(*(Remembering() for _ in range(5))).double(),
        torch.randn(3, 8, dtype=torch.float64),
    )
    before = [{k: v for k, v in vars(m).items() if k != "_modules"} for m in model.modules()]
    assert not isinstance(stamping.plan_stamping(model, {"input": x}), CannotStamp)
    assert [{k: v for k, v in vars(m).items() if k != "_modules"} for m in model.modules()] == before
    assert not any(layer.tables for layer in model)
    assert torch.isfinite(model(x)).all()


def test_weights_that_layers_share_stay_one() -> None:
    torch.manual_seed(0)
    model = Stack("nothing").double()
    for layer in model.layers:
        layer.up.weight = model.layers[0].up.weight
    x = torch.randn(3, 4, dtype=torch.float64)
    program = graphopt.capture(model, x)
    assert "is also" in program.facts[Capture].layers
    assert sum("up.weight" in w.name for w in program.weights.values()) == 1
    torch.testing.assert_close(program(x), model(x), rtol=1e-12, atol=1e-12)
