"""Parts of a package without the rest of it, which is there all the same as soon as it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forks import Forks

from graphopt.ir.late_package import import_parts

FILES = {
    "__init__.py": "from . import small\nfrom .large import answer\nready = True\ndef ask(): return 'its own'\n",
    "small.py": "from .smaller import size\nimport outer_{n}.inner\n",
    "smaller.py": "size = 1\n",
    "large.py": "from .small import size\nanswer = 41 + size\n",
    "another.py": "from .large import answer\n",
    "whole.py": "from . import ready\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package within a package, as torch's compiler is; its __init__ imports what is large."""
    outer = f"outer_{len(tmp_path.parts)}"
    for name, text in FILES.items():
        place = tmp_path / outer / "inner" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text.replace("outer_{n}", outer))
    (tmp_path / outer / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    importlib.import_module(outer)
    yield f"{outer}.inner"
    sys.meta_path[:] = finders
    for name in [n for n in sys.modules if n.partition(".")[0] == outer]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "ask",
    [
        lambda name: sys.modules[name].ready,
        lambda name: importlib.import_module(f"{name}.another"),
        lambda name: importlib.import_module(f"{name}.large"),
    ],
    ids=["a name", "a part that it does not import", "a part that it imports"],
)
def test_the_package_runs_when_more_of_it_is_asked_for(package: str, ask: Callable[[str], object]) -> None:
    import_parts(package, [f"{package}.small"], meanwhile={"ask": lambda: "meanwhile"})
    inner = importlib.import_module(package)
    small = inner.small
    assert f"{package}.large" not in sys.modules, "the whole package was imported"
    assert inner.ask() == "meanwhile"
    with pytest.raises(AttributeError):
        inner.__wrapped__  # noqa: B018
    assert f"{package}.large" not in sys.modules, "a look at what every object may have imports everything"
    ask(package)
    assert inner.answer == 42
    assert inner.ask() == "its own"
    assert inner.small is small is sys.modules[f"{package}.small"]
    assert inner.large is sys.modules[f"{package}.large"]
    assert inner.large.__spec__.loader.get_code is not None, "the part is not what Python made of its file"
    assert importlib.import_module(f"{package}.another").answer == 42


def test_what_takes_the_place_of_names_is_told(package: str) -> None:
    told: list[bool] = []
    import_parts(package, [f"{package}.smaller"], then=lambda: told.append(sys.modules[package].ready))
    assert not told
    assert sys.modules[package].answer == 42
    assert told == [True]


def test_a_part_that_needs_the_package_gets_it(package: str) -> None:
    import_parts(package, [f"{package}.whole"])
    assert sys.modules[package].ready
    assert sys.modules[f"{package}.whole"].ready
    import_parts(package, [f"{package}.smaller"], meanwhile={"ask": None})
    assert sys.modules[package].ask() == "its own", "the package was there already"


def test_the_compiler_waits_until_it_is_asked_for(forks: Forks) -> None:
    """Wrong if torch's parts moved: commands would take half a second longer, or leave out nothing of what is compiled."""
    code = """
import sys, torch
from graphopt.ir import compat
from graphopt.ir.infer import infer
compat.import_tracer()
mode, aten = compat.new_fake_mode(), torch.ops.aten
size = compat.symint(mode, compat.add_symbol(mode, "n", 2, None, 5), 5)
made = infer(mode, aten.add.Tensor, (compat.fake_tensor(mode, (size, 4), torch.float32), 1), {})
assert infer(mode, aten.mul.Tensor, (made, made), {}).shape[1] == 4
assert "torch._dynamo.symbolic_convert" not in sys.modules, "the whole compiler was imported"
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
from torch._dynamo.symbolic_convert import InstructionTranslator
import torch._dynamo.eval_frame
assert torch._dynamo.disable.__module__ == "torch._dynamo.decorators", "what stood for it is still there"
assert infer(mode, aten.add.Tensor, (made, 2), {}).shape[1] == 4
assert torch.compiler.disable(lambda: 3)() == 3
"""
    status, fork = forks.run(code)
    assert status == 0, fork.stderr
