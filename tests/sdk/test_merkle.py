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


@given(st.data(), SIZES)
def test_consistency_agrees_with_the_other_implementation(data: st.DataObject, new: int) -> None:
    old = data.draw(st.integers(1, new))
    path = merkle.consistency_proof(old, new, TREE.node)
    merkle.verify_consistency(old, TREE.roots[old], new, TREE.roots[new], path)
    # It splits a proof otherwise than the RFC does; that both lead from one tree to the other is what they agree on.
    their_consistency(TREE.roots[old], TREE.roots[new], TREE.theirs.prove_consistency(old, new))


def test_proofs_as_the_rfc_draws_them() -> None:
    """RFC 6962 section 2.1.3: the tree of seven leaves."""
    a, b, c, d, e, f, j = map(TREE.leaf, range(7))
    g, h, i = (merkle.node_hash(*pair) for pair in ((a, b), (c, d), (e, f)))
    k, l_ = merkle.node_hash(g, h), merkle.node_hash(i, j)
    assert [merkle.consistency_proof(old, 7, TREE.node) for old in (3, 4, 6)] == [(c, d, g, l_), (l_,), (i, j, k)]
    assert [merkle.inclusion_proof(index, 7, TREE.node) for index in (0, 6)] == [(b, h, l_), (i, k)]


def bent(data: st.DataObject, path: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
    """Other paths: of another hash, shorter, longer."""
    found = [(*path, bytes(32))]
    if path:
        at = data.draw(st.integers(0, len(path) - 1))
        found += [path[:-1], (*path[:at], bytes(32), *path[at + 1 :])]
    return found


@given(st.data(), SIZES)
def test_nothing_else_is_included(data: st.DataObject, size: int) -> None:
    index, other = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    leaf, path, root = TREE.leaf(index), merkle.inclusion_proof(index, size, TREE.node), TREE.roots[size]
    wrong = [(leaf, index, size, each, root) for each in bent(data, path)] + [
        (merkle.leaf_hash(b"another"), index, size, path, root), (leaf, index, size, path, TREE.roots[size - 1]),
        (leaf, size, size, path, root), (leaf, -1, size, path, root), (leaf, index, 2**41, path, root),
        *([(leaf, other, size, path, root)] if other != index else []),
    ]  # fmt: skip
    for case in wrong:
        with pytest.raises(InvalidProof):
            merkle.verify_inclusion(*case)


@given(st.data(), st.integers(2, 600))
def test_nothing_else_is_consistent(data: st.DataObject, new: int) -> None:
    old = data.draw(st.integers(1, new - 1))
    before, after, path = TREE.roots[old], TREE.roots[new], merkle.consistency_proof(old, new, TREE.node)
    wrong = [(old, before, new, after, each) for each in bent(data, path)] + [
        (old, bytes(32), new, after, path), (old, before, new, bytes(32), path), (new, after, old, before, path),
        (new, before, new, after, ()), (0, before, new, after, ()), (0, merkle.EMPTY_ROOT, new, after, path),
    ]  # fmt: skip
    for case in wrong:
        with pytest.raises(InvalidProof):
            merkle.verify_consistency(*case)


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_frontier_goes_on_from_where_it_stopped(size: int, more: int) -> None:
    frontier = merkle.Frontier()
    for index in range(size):
        frontier.grow(TREE.leaf(index))
    assert all(TREE.node(level, index) == node for level, index, node in frontier.nodes())
    copy = frontier.copy()
    for index in range(size, size + more):
        copy.grow(TREE.leaf(index))
    assert copy.root() == TREE.roots[size + more] and frontier.root() == TREE.roots[size]


def test_no_proof_of_what_is_not_there() -> None:
    for make in (lambda: merkle.inclusion_proof(3, 3, TREE.node), lambda: merkle.consistency_proof(4, 3, TREE.node)):
        with pytest.raises(ValueError, match=r"tree|smaller"):
            make()


def test_the_longest_path_is_within_the_bound() -> None:
    def node(level: int, index: int) -> bytes:
        return (level * 2**48 + index).to_bytes(32)

    assert len(merkle.inclusion_proof(0, merkle.MAX_LEAVES, node)) == merkle.MAX_PATH
