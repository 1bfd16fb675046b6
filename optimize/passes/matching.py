"""Matching: read patterns off a graph, and report why a match was declined.

A matcher is a function of a candidate node. It returns the match, returns None if the node is
plainly something else, or raises Declined if the node looks like the pattern but cannot be
rewritten. ``attempt`` turns the last case into None and records the reason, which
``collect_declined`` gathers for the log.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import onnx_ir as ir

from latentforge.optimize.graph import constant
from latentforge.runtime.kernels import DOMAIN

__all__ = [
    "MICROSOFT",
    "Declined",
    "DeclinedMatches",
    "attempt",
    "collect_declined",
    "decline",
    "find",
    "input_at",
    "is_channel_vector",
    "is_native",
    "producer_of",
    "scalar",
    "sole_consumer",
    "split_scalar",
]

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

Match = TypeVar("Match")

DeclinedMatches = dict[str, dict[str, None]]
"""By reason, the names of the nodes that were declined for it, in order and each once."""

_collected: ContextVar[DeclinedMatches | None] = ContextVar("declined", default=None)


class Declined(Exception):
    """Reason why a node that looks like a pattern's is not rewritten.

    The message completes the sentence "not rewritten, because ...".
    """


def attempt(matcher: Callable[[ir.Node], Match | None], node: ir.Node) -> Match | None:
    """Return what a matcher returns for a node, or None if it declines the node."""
    try:
        return matcher(node)
    except Declined as reason:
        decline(node, str(reason))
        return None


def find(
    graph: ir.Graph,
    matcher: Callable[[ir.Node], Match | None],
    op_type: str,
    *,
    domain: str | None = "",
) -> Iterator[Match]:
    """Yield the matches among a graph's nodes of one operator; the caller may edit the graph.

    Args:
        graph: to search, without the subgraphs of its nodes.
        matcher: function of a candidate node.
        op_type: operator of the candidates.
        domain: its domain; None for any.
    """
    for node in graph:
        if node.op_type == op_type and domain in (None, node.domain):
            if (match := attempt(matcher, node)) is not None:
                yield match


def decline(node: ir.Node, reason: str) -> None:
    """Record why a node is not rewritten, if reasons are being collected."""
    if (declined := _collected.get()) is not None:
        declined.setdefault(reason, {})[str(node.name)] = None


@contextmanager
def collect_declined() -> Iterator[DeclinedMatches]:
    """Collect the matches that are declined in the body of a ``with`` statement."""
    declined: DeclinedMatches = {}
    token = _collected.set(declined)
    try:
        yield declined
    finally:
        _collected.reset(token)


def producer_of(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that computes a value if it is one of these ONNX operators, else None."""
    node = value.producer() if value is not None else None
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in op_types:
        return None
    return node


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """Return the only node that uses a value; None if there are several or it is an output."""
    users = value.consumers()
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def is_native(node: ir.Node | None, op_type: str) -> bool:
    """Return True if a node is this operator of latentforge's library."""
    return node is not None and (node.domain, node.op_type) == (DOMAIN, op_type)


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, or None where it is left out or the node has fewer."""
    return node.inputs[index] if index < len(node.inputs) else None


def scalar(value: ir.Value | None) -> float | None:
    """Return the number that a constant of one element holds, or None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if value is None or tensor is None or tensor.size != 1:
        return None
    array = constant(value)
    return None if array is None else float(array.reshape(-1)[0])


def split_scalar(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Split Mul(x, number), in either order, or Div(x, number) into x and its factor."""
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        return None
    if (number := scalar(second)) is not None:
        return first, (1 / number if node.op_type == "Div" else number)
    if node.op_type == "Mul" and (number := scalar(first)) is not None:
        return second, number
    return None


def is_channel_vector(value: ir.Value | None, channels: int, trailing: int) -> bool:
    """Return True if a value is a constant with one number per channel.

    Args:
        value: of shape (channels, 1, ...) or (1, channels, 1, ...).
        channels: how many there are.
        trailing: number of axes of size 1 after the channels.
    """
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if value is None or tensor is None or value.is_graph_input():
        return False
    shape = list(tensor.shape.numpy())
    vector = [channels] + [1] * trailing
    return shape == vector or shape == [1, *vector]
