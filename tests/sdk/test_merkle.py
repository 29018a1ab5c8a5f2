"""Merkle trees and proofs: the RFC's own hashes, another implementation, and everything that a proof must not do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymerkle import InmemoryTree
from pymerkle.proof import verify_consistency as their_consistency
from pymerkle.proof import verify_inclusion as their_inclusion

from lacre.errors import InvalidProof
from lacre.evidence import merkle

SIZES = st.integers(1, 600)


class Tree:
    """Every complete subtree's hash, as `Frontier.grow` tells them, and the other implementation beside it."""

    def __init__(self, size: int) -> None:
        self.nodes: dict[tuple[int, int], bytes] = {}
        self.roots = [merkle.EMPTY_ROOT]
        self.theirs = InmemoryTree()
        frontier = merkle.Frontier()
        for number in range(size):
            entry = b"entry %d" % number
            self.theirs.append_entry(entry)
            for level, index, node in frontier.grow(merkle.leaf_hash(entry)):
                self.nodes[level, index] = node
            self.roots.append(frontier.root())

    def node(self, level: int, index: int) -> bytes:
        return self.nodes[level, index]

    def leaf(self, index: int) -> bytes:
        return self.nodes[0, index]


TREE = Tree(600)


def test_hashes_of_the_rfc() -> None:
    """The seven-leaf tree that RFC 6962 section 2.1.3 draws, with the leaves and hashes of the vectors in use everywhere."""
    leaves = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    roots = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ]
    frontier = merkle.Frontier()
    for leaf, root in zip(leaves, roots, strict=True):
        for _ in frontier.grow(merkle.leaf_hash(bytes.fromhex(leaf))):
            pass
        assert frontier.root().hex() == root


@given(SIZES)
def test_roots_are_those_of_the_other_implementation(size: int) -> None:
    assert merkle.root_hash(size, TREE.node) == TREE.roots[size] == TREE.theirs.get_root(size)


@given(st.data(), SIZES)
def test_inclusion_agrees_with_the_other_implementation(data: st.DataObject, size: int) -> None:
    index = data.draw(st.integers(0, size - 1))
    path = merkle.inclusion_proof(index, size, TREE.node)
    theirs = TREE.theirs.prove_inclusion(index + 1, size)
    assert list(path) == theirs.path[1:]
    their_inclusion(TREE.leaf(index), TREE.roots[size], theirs)
    merkle.verify_inclusion(TREE.leaf(index), index, size, path, TREE.roots[size])
    merkle.verify_inclusion(TREE.leaf(index), index, size, theirs.path[1:], TREE.roots[size])


@given(st.data(), SIZES)
def test_consistency_agrees_with_the_other_implementation(data: st.DataObject, new: int) -> None:
    old = data.draw(st.integers(1, new))
    path = merkle.consistency_proof(old, new, TREE.node)
    merkle.verify_consistency(old, TREE.roots[old], new, TREE.roots[new], path)
    # It splits a proof otherwise than the RFC does; that both lead from one tree to the other is what they agree on.
    their_consistency(TREE.roots[old], TREE.roots[new], TREE.theirs.prove_consistency(old, new))


def test_consistency_as_the_rfc_draws_it() -> None:
    """RFC 6962 section 2.1.3: the tree of seven leaves."""
    leaves = dict(zip("abcdefj", map(TREE.leaf, range(7)), strict=True))
    c, d, j = leaves["c"], leaves["d"], leaves["j"]
    g, h, i = (merkle.node_hash(leaves[x], leaves[y]) for x, y in ("ab", "cd", "ef"))
    k, l_ = merkle.node_hash(g, h), merkle.node_hash(i, j)
    assert merkle.consistency_proof(3, 7, TREE.node) == (c, d, g, l_)
    assert merkle.consistency_proof(4, 7, TREE.node) == (l_,)
    assert merkle.consistency_proof(6, 7, TREE.node) == (i, j, k)
    assert merkle.inclusion_proof(0, 7, TREE.node) == (leaves["b"], h, l_)
    assert merkle.inclusion_proof(6, 7, TREE.node) == (i, k)


@given(st.data(), SIZES)
def test_nothing_else_is_included(data: st.DataObject, size: int) -> None:
    index = data.draw(st.integers(0, size - 1))
    path = merkle.inclusion_proof(index, size, TREE.node)
    wrong = [
        (merkle.leaf_hash(b"another"), index, size, path, TREE.roots[size]),
        (TREE.leaf(index), index, size, (*path, bytes(32)), TREE.roots[size]),
        (TREE.leaf(index), index, size, path, TREE.roots[size - 1]),
        (TREE.leaf(index), size, size, path, TREE.roots[size]),
        (TREE.leaf(index), -1, size, path, TREE.roots[size]),
        (TREE.leaf(index), index, 2**41, path, TREE.roots[size]),
    ]
    if path:
        spoiled = list(path)
        spoiled[data.draw(st.integers(0, len(path) - 1))] = bytes(32)
        wrong += [(TREE.leaf(index), index, size, tuple(spoiled), TREE.roots[size])]
        wrong += [(TREE.leaf(index), index, size, path[:-1], TREE.roots[size])]
        other = data.draw(st.integers(0, size - 1).filter(lambda place: place != index))
        wrong += [(TREE.leaf(index), other, size, path, TREE.roots[size])]
    for case in wrong:
        with pytest.raises(InvalidProof):
            merkle.verify_inclusion(*case)


@given(st.data(), st.integers(2, 600))
def test_nothing_else_is_consistent(data: st.DataObject, new: int) -> None:
    old = data.draw(st.integers(1, new - 1))
    path = merkle.consistency_proof(old, new, TREE.node)
    spoiled = list(path)
    spoiled[data.draw(st.integers(0, len(path) - 1))] = bytes(32)
    wrong = [
        (old, TREE.roots[old], new, TREE.roots[new], tuple(spoiled)),
        (old, TREE.roots[old], new, TREE.roots[new], path[:-1]),
        (old, TREE.roots[old], new, TREE.roots[new], (*path, bytes(32))),
        (old, bytes(32), new, TREE.roots[new], path),
        (old, TREE.roots[old], new, bytes(32), path),
        (new, TREE.roots[new], old, TREE.roots[old], path),
        (new, TREE.roots[old], new, TREE.roots[new], ()),
        (0, TREE.roots[old], new, TREE.roots[new], ()),
        (0, merkle.EMPTY_ROOT, new, TREE.roots[new], path),
    ]
    for case in wrong:
        with pytest.raises(InvalidProof):
            merkle.verify_consistency(*case)


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_frontier_goes_on_from_where_it_stopped(size: int, more: int) -> None:
    frontier = merkle.Frontier()
    for index in range(size):
        frontier.grow(TREE.leaf(index))
    assert [(level, index) for level, index, _ in frontier.nodes() if TREE.node(level, index) != _] == []
    copy = frontier.copy()
    for index in range(size, size + more):
        copy.grow(TREE.leaf(index))
    assert copy.root() == TREE.roots[size + more] and frontier.root() == TREE.roots[size]


def test_a_leaf_is_never_a_node() -> None:
    left, right = TREE.leaf(0), TREE.leaf(1)
    assert merkle.leaf_hash(left + right) != merkle.node_hash(left, right)


def test_no_proof_of_what_is_not_there() -> None:
    for make in (lambda: merkle.inclusion_proof(3, 3, TREE.node), lambda: merkle.consistency_proof(4, 3, TREE.node)):
        with pytest.raises(ValueError, match=r"tree|smaller"):
            make()


def test_the_longest_path_is_within_the_bound() -> None:
    def node(level: int, index: int) -> bytes:
        return (level * 2**48 + index).to_bytes(32)

    assert len(merkle.inclusion_proof(0, merkle.MAX_LEAVES, node)) == merkle.MAX_PATH
