"""The only place where graphs are edited: new nodes get inferred shapes and the name of the pass that made them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .errors import UsageError, VerificationError
from .infer import describe_value, infer, same_value
from .schema import arguments, is_mutable, normal_call, normalise
from .weights import InMemory, TensorSource, Weight

if TYPE_CHECKING:
    from .program import Program

RECORDING: dict[str, Callable[..., Any]] = {}
"""Functions that record functions as nodes: ``emit`` and ``stand_in``, from :mod:`graphopt.ir.rewriting.stamping`."""


class Editor:
    """Edits the graph of one program.

    ``journal`` is the edit log: each replaced value as (name of the old node, new node), which contract checks
    compare. ``author`` is recorded in every new node.
    """

    def __init__(self, program: Program):
        self.program = program
        self.graph = program.graph
        self.journal: list[tuple[str, fx.Node]] = []
        self.author = ""
        self.touched: dict[fx.Node, None] = {}
        self._replaced: dict[fx.Node, fx.Node] = {}
        self.keep: frozenset[fx.Node] = frozenset()

    # -- making nodes -------------------------------------------------------------------------------

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call at the insertion point, with its value inferred."""
        value = infer(self.program.mode, target, args, kwargs)
        node = self.graph.call_function(target, args, kwargs)
        if stale := [n for n in node.all_input_nodes if n._erased or n.graph is not self.graph]:
            self.graph.erase_node(node)
            self.require_present(*stale)
        node.meta["val"] = value
        normalise(node)
        self.adopt(node)
        return node

    def _sign(self, node: fx.Node) -> None:
        if self.author:
            node.meta["custom"] = {"graphopt": {"pass": self.author}}

    @contextlib.contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert new nodes before ``node``."""
        self.require_present(node)
        with self.graph.inserting_before(node):
            yield

    @contextlib.contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """Insert new nodes after ``node`` (after all placeholders if it is one)."""
        self.require_present(node)
        anchor = node
        if node.op == "placeholder":
            anchor = list(self.graph.find_nodes(op="placeholder"))[-1]
        with self.graph.inserting_before(anchor.next):
            yield

    def change(self, node: fx.Node, **changed: Any) -> None:
        """Change arguments of a call, by name; its value must keep its shape and type.

        Raises:
            VerificationError: the value would change its shape or type.
        """
        self.require_present(node)
        args, kwargs = normal_call(node.target, {**arguments(node), **changed})
        value = infer(self.program.mode, node.target, args, kwargs)
        if not same_value(node.meta["val"], value):
            raise VerificationError(f"{node.name} would become {describe_value(value)}", node=node.name)
        node.args, node.kwargs = args, kwargs
        self.touched[node] = None
        self.program.changed()

    def hoist(self, node: fx.Node, before: fx.Node) -> None:
        """Move a value, and the nodes it is computed from, before a node that it does not depend on."""
        late: set[fx.Node] = set()
        work = [node]
        while work:
            current = work.pop()
            if current not in late and before < current:
                late.add(current)
                work.extend(current.all_input_nodes)
        for current in sorted(late):
            before.prepend(current)
        self.program.changed()

    def adopt(self, node: fx.Node) -> None:
        """Register a node whose value is known and whose call is normalised."""
        self._sign(node)
        self.touched[node] = None
        self.program.changed()

    def emit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Insert a function of tensors on these arguments; see :func:`~graphopt.ir.rewriting.tracing.trace`.

        Returns:
            One node, or a list of them where the function returns several.
        """
        return RECORDING["emit"](self, function, arguments)

    def stand_in(self, old: fx.Node, function: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.Node:
        """Insert ``function(*arguments)`` as a possible replacement of ``old``, and return its node.

        Raises:
            UsageError: the function cannot be recorded, or returns several values.
            VerificationError: it returns another shape or type.
        """
        node: fx.Node = RECORDING["stand_in"](self, old, function, arguments)
        return node

    # -- replacing ----------------------------------------------------------------------------------

    def replace(self, old: fx.Node, new: fx.Node, *, same: bool = True, record: bool = True) -> None:
        """Make all users of ``old`` read ``new``, and remove nodes that only ``old`` needed.

        Raises:
            VerificationError: the values differ in shape or type, and ``same`` is set.
            UsageError: a node is no longer part of the program.
        """
        self.require_present(old, new)
        if same:
            self.require_same(old, new)
        self._carry(old, new)
        self._replaced[old] = new
        if record:
            self.journal.append((old.name, new))
        for user in old.users:
            self.touched[user] = None
        for name, node in list(self.program.checkpoint.items()):
            if node is old and old.op != "placeholder":
                self.program.checkpoint[name] = new
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.program.changed()
        self.erase_dead([old])

    def now(self, node: fx.Node) -> fx.Node:
        """Return the current node of a value: the node itself, or its latest replacement."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def end(self) -> None:
        """Clear the edit log, the touched nodes and the author, after a pass was checked."""
        self.author = ""
        self.journal.clear()
        self.touched.clear()
        self._replaced.clear()

    def require_present(self, *nodes: fx.Node) -> None:
        """Check that nodes are in this graph, since editing through any other would be lost or corrupt the graph.

        Raises:
            UsageError: a node was erased by an earlier edit, or belongs to another program.
        """
        for node in nodes:
            if node.graph is not self.graph:
                raise UsageError(
                    f"{node.name} belongs to another program",
                    hint=f"find it in this one: program.node({node.name!r})",
                )
            if node._erased:
                raise UsageError(
                    f"{node.name} is no longer part of the program: an earlier edit replaced or removed it",
                    hint="look nodes and blocks up again after an edit: program.anatomy, program.node(name)",
                )

    def require_same(self, old: fx.Node, new: fx.Node) -> None:
        """Check that a value can replace another.

        Raises:
            VerificationError: they differ in shape or type.
        """
        if not same_value(old.meta.get("val"), new.meta.get("val")):
            raise VerificationError(
                f"{new.name} ({describe_value(new.meta.get('val'))}) cannot stand for "
                f"{old.name} ({describe_value(old.meta.get('val'))})",
                node=old.name,
                source=self.program.source_line(old),
            )

    def _carry(self, old: fx.Node, new: fx.Node) -> None:
        for key in ("stack_trace", "nn_module_stack"):
            if key in old.meta and key not in new.meta:
                new.meta[key] = old.meta[key]

    def erase_dead(self, nodes: Iterable[fx.Node]) -> None:
        """Erase the nodes that are unused, and recursively the operands that only they used."""
        pinned = set(self.program.checkpoint.values()) | self.keep
        work = list(nodes)
        while work:
            node = work.pop()
            if node._erased or node.users or node.op != "call_function" or node in pinned:
                continue
            if is_mutable(node.target):
                continue
            inputs = list(node.all_input_nodes)
            self.touched.pop(node, None)
            self.graph.erase_node(node)
            work.extend(inputs)
        self.program.changed()

    # -- weights, outputs ---------------------------------------------------------------------------

    def add_weight(
        self,
        name: str,
        source: TensorSource | torch.Tensor,
        *,
        kind: str = "parameter",
        persistent: bool = True,
        like: fx.Node | None = None,
    ) -> fx.Node:
        """Add a placeholder for a tensor of the model and return it.

        Raises:
            VerificationError: the program already has a tensor of that name.
        """
        if isinstance(source, torch.Tensor):
            source = InMemory(source.detach())
        if any(name == w.name or name in w.names for w in self.program.weights.values()):
            raise VerificationError(f"the program already has a weight named {name!r}")
        placeholders = [n for n in self.program.weight_nodes if n.name in self.program.weights]
        insertion_point = self.graph.inserting_before(like) if like is not None else None
        if insertion_point is None and placeholders:
            insertion_point = self.graph.inserting_after(placeholders[-1])
        elif insertion_point is None:
            insertion_point = self.graph.inserting_before(next(iter(self.graph.nodes)))
        with insertion_point:
            target = "w_" + "".join(c if c.isalnum() else "_" for c in name)
            node = self.graph.placeholder(target)
        node.target = node.name
        node.meta["val"] = self.program.fake(source.shape, source.dtype)
        self._sign(node)
        self.program.weights[node.name] = Weight(
            name=name,
            source=source,
            kind=kind,  # type: ignore[arg-type]
            persistent=persistent,
            trainable=kind == "parameter",
        )
        self.program.changed()
        return node

    def remove_weight(self, node: fx.Node) -> None:
        """Remove the placeholder of an unused weight."""
        if node.users or node in self.program.checkpoint.values():
            raise VerificationError("a weight that is still read cannot be removed", node=node.name)
        del self.program.weights[node.name]
        self.graph.erase_node(node)
        self.program.changed()

    def set_outputs(self, values: Sequence[fx.Node]) -> None:
        """Set the values that the program returns, in the order of its signature."""
        self.require_present(*values)
        output = self.program.output_node
        output.args = (tuple(values),)
        output.meta["val"] = tuple(v.meta["val"] for v in values)
        self.program.changed()
