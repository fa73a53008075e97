"""Trees of tensors."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtail import trees
from fedtail.trees import Tree


class Pair(NamedTuple):
    left: Tree
    right: Tree


class Other(NamedTuple):
    left: Tree
    right: Tree


def leaf(values):
    return torch.tensor(values, dtype=torch.float64)


any_leaf = st.one_of(
    st.lists(st.floats(-10, 10), max_size=3).map(leaf),
    st.integers(-5, 5).map(lambda v: torch.tensor(v)),
)
any_tree = st.recursive(
    any_leaf,
    lambda child: st.one_of(
        st.builds(Pair, child, child),
        st.dictionaries(st.sampled_from(["a", "b.weight", "c"]), child, max_size=3),
        st.lists(child, max_size=2).map(tuple),
    ),
    max_leaves=8,
)
TREE = Pair({"conv.weight": leaf([1, 2]), "b": ()}, (torch.tensor(3), {"z": leaf(0.5)}))


def test_names_are_paths_in_order():
    assert list(trees.named_leaves(TREE)) == ["left/conv.weight", "right/0", "right/1/z"]
    assert next(iter(trees.named_leaves(TREE, "server"))) == "server/left/conv.weight"
    assert list(trees.named_leaves(leaf(1), "server")) == ["server"]
    assert trees.named_leaves(()) == {}
    assert [x.tolist() for x in trees.leaves(TREE)] == [[1, 2], 3, 0.5]


@given(any_tree)
def test_map_keeps_the_form(tree):
    found = trees.tree_map(lambda t: t * 2, tree)
    assert type(found) is type(tree)
    assert list(trees.named_leaves(found)) == list(trees.named_leaves(tree))
    assert all(torch.equal(a, b * 2) for a, b in zip(trees.leaves(found), trees.leaves(tree), strict=True))
    assert trees.equal(tree, trees.tree_map(lambda t: t, tree))


@given(any_tree)
def test_map_pairs_by_name_not_by_order(tree):
    def backwards(node):
        if isinstance(node, torch.Tensor):
            return node
        children = [(k, backwards(v)) for k, v in trees.items(node)]
        return dict(reversed(children)) if isinstance(node, dict) else trees.rebuild(node, [v for _, v in children])

    found = trees.tree_map(lambda a, b: a - b, tree, backwards(tree))
    assert all(not bool(x.any()) for x in trees.leaves(found))


def test_map_needs_every_name():
    with pytest.raises(KeyError, match="b"):
        trees.tree_map(lambda a, b: a, {"a": leaf(1), "b": leaf(2)}, {"a": leaf(1)})


@given(st.lists(any_leaf, min_size=1, max_size=1).map(lambda x: x[0]), st.integers(1, 4))
def test_rows_of_a_stack_are_what_was_stacked(value, copies):
    originals = [Pair({"a": value + i}, (value - i, ())) for i in range(copies)]
    stacked = trees.stack(originals)
    assert trees.leaves(stacked)[0].shape == (copies, *value.shape)
    for i, tree in enumerate(originals):
        row = trees.row(stacked, i)
        assert type(row) is Pair
        assert trees.equal(row, tree)


def test_rows_and_clones_own_their_memory():
    stacked = trees.stack([{"a": leaf([1, 2])}, {"a": leaf([3, 4])}])
    row = trees.row(stacked, 0)
    row["a"].zero_()
    assert stacked["a"].tolist() == [[1, 2], [3, 4]]
    original = {"a": leaf([1.0, 2.0]).requires_grad_()}
    copy = trees.clone(original)
    assert not copy["a"].requires_grad
    copy["a"].zero_()
    assert original["a"].tolist() == [1, 2]


def test_stateless_clients_stack_to_nothing():
    assert trees.stack([(), (), ()]) == ()
    assert trees.row((), 1) == ()


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"a": leaf([1, 2]), "b": leaf(3)}, True),
        ({"b": leaf(3), "a": leaf([1, 2])}, True),  # the order of a dict's keys is no difference
        ({"a": leaf([1, 2])}, False),
        ({"a": leaf([1, 2]), "b": leaf(3), "c": leaf(0)}, False),
        ({"a": leaf([1, 2]), "b": leaf([3])}, False),
        ({"a": leaf([1, 2]), "b": leaf(3).float()}, False),
        ({"a": leaf([1, 2]), "b": torch.tensor(3)}, False),
        ({"a": leaf([1, 2 + 1e-15]), "b": leaf(3)}, False),
        ({"a": leaf([1, float("nan")]), "b": leaf(3)}, False),
    ],
)
def test_equal_is_exact(other, expected):
    assert trees.equal({"a": leaf([1, 2]), "b": leaf(3)}, other) is expected


def test_bytes_by_hand():
    """Two float32 (8), three int64 (24), one float64 (8), nothing (0)."""
    assert (
        trees.num_bytes(Pair({"a": torch.zeros(2), "b": torch.zeros(0)}, (torch.zeros(3, dtype=torch.int64), leaf(1))))
        == 40
    )
    assert trees.num_bytes(()) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite(bad):
    assert trees.all_finite(TREE)
    assert not trees.all_finite({"a": leaf([1, bad, 2])})
    assert not trees.all_finite({"a": leaf([float("inf"), -float("inf")])})
    assert trees.all_finite({"a": leaf([1e308, 1e308])})  # the sum overflows, no entry does
    assert trees.all_finite({"n": torch.tensor([2**62, 2**62])})  # integers are always finite


@pytest.mark.parametrize("wrong", [3.0, None, [torch.zeros(1)], "x", torch.nn.Linear(1, 1)])
def test_what_is_no_tree_says_what_to_do(wrong):
    with pytest.raises(TypeError, match=f"NamedTuples, tuples or dicts of tensors; got {type(wrong).__name__}"):
        trees.leaves({"a": wrong})
    with pytest.raises(TypeError, match="Turn numbers into tensors"):
        trees.tree_map(lambda t: t, (wrong,))


def test_rebuild_keeps_the_class():
    assert trees.rebuild(Other(1, 2), [3, 4]) == Other(3, 4)
    assert type(trees.rebuild(Other(1, 2), [3, 4])) is Other
    assert trees.rebuild((), []) == ()
    with pytest.raises(ValueError, match="zip"):
        trees.rebuild({"a": 1}, [1, 2])
