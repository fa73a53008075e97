"""Trees of tensors: NamedTuples, dicts and tuples whose leaves are tensors.

States, messages and updates are such trees. Everything generic (stacking, saving, comparing) goes through these functions.
A plain recursion is used rather than torch's private tree module: it is faster on small trees and is public.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

Tree = Any  # a Tensor, or a NamedTuple, tuple or dict of trees; () is the empty tree


def rebuild(node: Tree, children: Sequence[Tree]) -> Tree:
    """Returns a node of the same kind as `node` (dict, tuple or NamedTuple) with other children, in the same order."""
    if isinstance(node, dict):
        return dict(zip(cast("dict[str, Tree]", node), children, strict=True))
    return type(node)(*children) if hasattr(node, "_fields") else tuple(children)


def items(node: Tree) -> Iterator[tuple[str, Tree]]:
    """Yields (name, child) of one node; raises TypeError for what is neither a node nor a tensor."""
    if isinstance(node, dict):
        yield from cast("dict[str, Tree]", node).items()
    elif isinstance(node, tuple):
        node = cast("tuple[Tree, ...]", node)
        yield from zip(getattr(node, "_fields", map(str, range(len(node)))), node, strict=True)
    else:
        raise TypeError(
            f"states, messages and updates are NamedTuples, tuples or dicts of tensors; got {type(node).__name__}. "
            "Turn numbers into tensors (torch.tensor(...)) and None into ()."
        )


def tree_map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Applies `function` to each leaf of `tree` (and the leaves at the same place in `rest`)."""
    if isinstance(tree, Tensor):
        return function(tree, *rest)
    if isinstance(tree, dict):  # nearly all leaves are here, and a local step must not pay for generality
        branch = cast("dict[str, Tree]", tree)
        return {k: tree_map(function, v, *[other[k] for other in rest]) for k, v in branch.items()}
    return rebuild(tree, [tree_map(function, *parts) for parts in zip(_children(tree), *rest, strict=True)])


def _children(node: Tree) -> Iterable[Tree]:
    return cast("tuple[Tree, ...]", node) if isinstance(node, tuple) else (child for _, child in items(node))


def named_leaves(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
    """Returns the leaves by path: `("params", "conv.weight")` becomes `params/conv.weight`."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    found: dict[str, Tensor] = {}
    for name, child in items(tree):
        found.update(named_leaves(child, f"{prefix}/{name}" if prefix else name))
    return found


def leaves(tree: Tree) -> list[Tensor]:
    """Returns the leaves in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for child in _children(tree) for leaf in leaves(child)]


def stack(trees: Sequence[Tree]) -> Tree:
    """Stacks equal trees: each leaf gets a new first axis, one entry a tree."""
    return tree_map(lambda *parts: torch.stack(parts), *trees)


def row(tree: Tree, index: int) -> Tree:
    """Returns entry `index` of a stacked tree, as copies that own their memory."""
    return tree_map(lambda leaf: leaf[index].clone(), tree)


def clone(tree: Tree) -> Tree:
    """Returns the tree with every tensor copied and detached."""
    return tree_map(lambda leaf: leaf.detach().clone(), tree)


def equal(first: Tree, second: Tree) -> bool:
    """Says whether two trees have the same paths and bit-equal leaves (dtype and shape included)."""
    a, b = named_leaves(first), named_leaves(second)
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and x.shape == b[k].shape and torch.equal(x, b[k]) for k, x in a.items()
    )


def num_bytes(tree: Tree) -> int:
    """Returns the size of all leaves in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree))


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns tensors as numbers and nested lists."""
    return {k: v.detach().cpu().double().tolist() if isinstance(v, Tensor) else v for k, v in metrics.items()}


def all_finite(tree: Tree) -> bool:
    """Says whether every floating leaf is finite: a sum is NaN or infinite as soon as one entry is (or it overflows)."""
    floating = (x for x in leaves(tree) if x.is_floating_point())
    return all(math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all()) for x in floating)
