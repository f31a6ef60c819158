"""Export of a program to an ``nn.Module`` for any trainer, with a submodule per layer and the original parameter names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn

from ...ir.anatomy.residual import between
from ...ir.program import Program
from ...ir.ranks.rank_programs import runnable
from ...ir.running.fold import fold
from ...ir.weights import InMemory, Weight


@dataclass
class _Block:
    """A layer as a submodule: its nodes, the values it reads and returns, and its path."""

    path: str
    nodes: list[fx.Node]
    reads: list[fx.Node] = field(default_factory=list)
    gives: list[fx.Node] = field(default_factory=list)


class _Calling:
    """Calling convention of a program; shared by copies of a module, as it never changes."""

    def __init__(self, program: Program, source: Program):
        self.signature = program.signature
        self.program = program
        self.source = source
        plain = [{"leaf": name} for name in program.signature.inputs]
        self.positional = (
            list(program.signature.parameters.values()) == plain
            and not program.dials
            and not any(i.filled_positions_only for i in program.signature.inputs.values())
        )
        self.names = list(program.signature.inputs)
        self.output_names = program.signature.output_names
        self.accepted: set[tuple[tuple[torch.dtype, torch.Size], ...]] = set()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the flat inputs; types and sizes that were accepted once are not checked again."""
        quick = self.positional and not kwargs and len(args) == len(self.names)
        if not quick or torch.compiler.is_compiling() or any(type(a) is not torch.Tensor for a in args):
            return self.program.bind(args, kwargs)
        key = tuple((a.dtype, a.shape) for a in args)
        if key in self.accepted:
            return dict(zip(self.names, args, strict=True))
        bound = self.program.bind(args, kwargs)
        if len(self.accepted) < 256:
            self.accepted.add(key)
        return bound

    def results(self, values: Any) -> Any:
        """Return the outputs in the structure of the model's outputs."""
        if "leaf" in self.signature.outputs:
            return values[0]
        return self.signature.unflatten(dict(zip(self.output_names, values, strict=True)))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Calling:
        return self


class ProgramModule(nn.Module):
    """A trainable program, which is called like the model.

    Dropout and batch statistics are as they were at capture. Blocks with the same computation share one
    class, so that ``for block in module.program_blocks(): block.compile(dynamic=True)`` compiles it once.
    """

    def __init__(self, program: Program, source: Program):
        super().__init__()
        self.__dict__["_calling"] = _Calling(program, source)
        self.__dict__["_block_paths"] = []

    def program_blocks(self) -> list[nn.Module]:
        """Return the submodules that are layers, in execution order."""
        return [self.get_submodule(path) for path in self.__dict__["_block_paths"]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the model's inputs; optional ones are filled in."""
        calling = self.__dict__["_calling"]
        return calling.results(self._run(**calling.bind(args, kwargs)))

    def _run(self, **inputs: torch.Tensor) -> Any:
        raise RuntimeError("a ProgramModule is made by Program.module()")


def program_module(program: Program, *, fold_weights: bool = False) -> nn.Module:
    """Return the program as a module with its own parameters.

    Of a sharded program, the module is this process's rank; in a single process it is all ranks at once.

    Args:
        program: not changed; its tensors are copied, so that training affects neither it nor the model.
        fold_weights: compute once what depends on weights alone, for inference; otherwise gradients reach the
            original parameters through those computations.
    """
    program = runnable(program)
    work = fold(program) if fold_weights else program.copy()
    module = ProgramModule(program, work.copy())
    names = _register(module, work)
    blocks = _find_blocks(work, names)
    classes: dict[Any, type[nn.Module]] = {}
    installed: dict[str, Any] = {}
    for block in list(blocks):
        key, graph = _block_graph(block, names)
        # what does something else with the same weights, as another rank does, stays outside
        if installed.setdefault(block.path, key) != key:
            blocks.remove(block)
            continue
        if key not in classes:
            classes[key] = _class_of(f"Block{len(classes)}", graph, nn.Module)
        _install(module, block.path, classes[key])
    module.__dict__["_block_paths"] = list(dict.fromkeys(block.path for block in blocks))
    root = _root_graph(work, blocks, names)
    module.__class__ = cast(type[ProgramModule], _class_of("ProgramModule", root, ProgramModule, "_run"))
    return module


def program_of(module: ProgramModule) -> Program:
    """Return the program that a module was made from, with the module's current weights.

    The weights are copies: further training does not change the program.
    """
    program: Program = module.__dict__["_calling"].source.copy()
    now = dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )
    for node in program.weight_nodes:
        weight = program.weights[node.name]
        value = now.get(weight.name)
        if value is not None:
            program.weights[node.name] = weight.with_source(InMemory(value.detach().cpu().clone()))
    program.changed()
    return program


def _class_of(name: str, graph: fx.Graph, base: type[nn.Module], method: str = "forward") -> type[nn.Module]:
    """Return a plain class whose ``forward`` is the graph's code."""
    # not a GraphModule, in which no submodule of the model may be called "graph"
    code = graph.python_code(root_module="self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<{name}>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return type(name, (base,), {method: function, "__module__": __name__})


def _register(module: nn.Module, program: Program) -> dict[fx.Node, str]:
    """Register copies of all weights under their names and return the name of each placeholder."""
    names: dict[fx.Node, str] = {}
    for node in program.weight_nodes:
        if not node.users:
            continue
        weight = program.weights[node.name]
        tensor = weight.source.load()
        if isinstance(weight.source, InMemory):
            tensor = tensor.clone()
        value: torch.Tensor = tensor
        trainable = weight.kind == "parameter" and tensor.dtype.is_floating_point
        if trainable:
            value = nn.Parameter(tensor, requires_grad=weight.trainable)
        names[node] = weight.name
        for name in weight.all_names:
            _attach(module, name, value, weight, trainable)
    return names


def _attach(module: nn.Module, name: str, value: torch.Tensor, weight: Weight, parameter: bool) -> None:
    owner = module
    *path, leaf = name.split(".")
    for attribute in path:
        if attribute not in owner._modules:
            owner.add_module(attribute, nn.Module())
        owner = owner._modules[attribute]  # type: ignore[assignment]
    if parameter:
        owner.register_parameter(leaf, value)  # type: ignore[arg-type]
    else:
        owner.register_buffer(leaf, value, persistent=weight.persistent and weight.kind == "buffer")


def _find_blocks(program: Program, names: dict[fx.Node, str]) -> list[_Block]:
    """Return the layers that can be submodules: those with their own weights under one path."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    blocks: list[_Block] = []
    assigned: set[fx.Node] = set()
    owners: dict[str, tuple[str, ...]] = {}
    for layer in program.anatomy.layers:
        inside = set(between(layer.reads, layer.writes, order))
        inside |= _own_weight_nodes(inside, program)
        weights = sorted({names[n] for node in inside for n in node.all_input_nodes if n in names})
        path = _common_path(weights)
        if not path or inside & assigned or owners.get(path, tuple(weights)) != tuple(weights):
            continue
        if any(
            other != path and (other.startswith(path + ".") or path.startswith(other + "."))
            for other in owners
        ):
            continue
        block = _Block(path, sorted(inside, key=lambda n: order[n]))
        # in the order of use, which is the same in equal layers
        used = (n for node in block.nodes for n in node.all_input_nodes)
        block.reads = list(dict.fromkeys(n for n in used if n not in inside and n not in names))
        block.gives = [n for n in block.nodes if any(u not in inside for u in n.users)]
        readers = [order[u] for n in block.gives for u in n.users if u not in inside]
        if max((order[n] for n in block.reads), default=-1) >= min(readers, default=len(order)):
            continue  # a part of it is needed before all its inputs are available
        owners[path] = tuple(weights)
        assigned |= inside
        blocks.append(block)
    return blocks


def _own_weight_nodes(inside: set[fx.Node], program: Program) -> set[fx.Node]:
    """Return the nodes computed from weights for this layer alone, which belong to it."""
    from ...ir.running.fold import depends_on_weights_alone

    constant = depends_on_weights_alone(program)
    nodes: set[fx.Node] = set()
    work = [n for node in inside for n in node.all_input_nodes]
    while work:
        node = work.pop()
        if node in inside or node in nodes or node.op != "call_function" or node not in constant:
            continue
        if all(u in inside or u in nodes for u in node.users):
            nodes.add(node)
            work.extend(node.all_input_nodes)
    return nodes


def _common_path(names: list[str]) -> str:
    if not names:
        return ""
    module_paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for level in zip(*module_paths, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _block_graph(block: _Block, names: dict[fx.Node, str]) -> tuple[Any, fx.Graph]:
    """Return a graph of the block with its weights as attributes, and a key that equal blocks share."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    key: list[Any] = []
    for index, node in enumerate(block.reads):
        copies[node] = graph.placeholder(f"x{index}")
    for node in block.nodes:
        for used in node.all_input_nodes:
            if used not in copies:
                relative = names[used].removeprefix(block.path + ".")
                copies[used] = _attribute(graph, relative)
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        index_of = {c: i for i, c in enumerate(graph.nodes)}
        at = {n: cast(Any, _At(index_of[copies[n]])) for n in node.all_input_nodes}
        key.append((str(node.target), repr(fx.map_arg((node.args, node.kwargs), at.__getitem__))))
    key.extend(str(n.target) for n in graph.nodes if n.op == "get_attr")
    results = [copies[n] for n in block.gives]
    graph.output(results[0] if len(results) == 1 else tuple(results))
    return (tuple(key), len(block.reads), len(results)), graph


@dataclass(frozen=True)
class _At:
    place: int


def _attribute(graph: fx.Graph, target: str) -> fx.Node:
    """Read an attribute without fx's warning that it does not exist."""
    return graph.create_node("get_attr", target)


def _install(module: nn.Module, path: str, kind: type[nn.Module]) -> None:
    """Make the container at ``path`` an instance of the block's class."""
    submodule = module.get_submodule(path)
    submodule.__class__ = kind


def _root_graph(program: Program, blocks: list[_Block], names: dict[fx.Node, str]) -> fx.Graph:
    """Return the graph that calls the blocks; a call is placed once its last argument exists."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    owner = {node: block for block in blocks for node in block.nodes}
    called: set[int] = set()
    for label, node in sorted(
        program.input_nodes.items(), key=lambda item: list(program.graph.nodes).index(item[1])
    ):
        copies[node] = graph.placeholder(label)

    def attribute(node: fx.Node) -> None:
        if node in names and node not in copies:
            copies[node] = _attribute(graph, names[node])

    def ready(block: _Block) -> bool:
        return all(n in copies for n in block.reads)

    def call(block: _Block) -> None:
        called.add(id(block))
        result = graph.call_module(block.path, tuple(copies[n] for n in block.reads))
        if len(block.gives) == 1:
            copies[block.gives[0]] = result
        else:
            for index, node in enumerate(block.gives):
                import operator

                copies[node] = graph.call_function(operator.getitem, (result, index))

    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(tuple(_returned(copies, n, attribute) for n in node.args[0]))
        elif node in owner:
            block = owner[node]
            if id(block) not in called and ready(block):
                call(block)
        elif node.op == "call_function":
            for used in node.all_input_nodes:
                attribute(used)
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return graph


def _returned(copies: dict[fx.Node, fx.Node], node: fx.Node, attribute: Callable[[fx.Node], None]) -> fx.Node:
    attribute(node)
    return copies[node]
