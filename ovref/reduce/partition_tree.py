"""Which noun belongs to which partition: a tree that cuts the vocabulary in two, again and again.

Nouns that are near each other in text space mostly share a partition, and so do the references that
rare nouns borrow from their neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ovref.errors import StorageError
from ovref.reduce.vector_file import VectorFile

_ROWS = 65_536
"""Rows of a matrix product, which in float32 are 200 MB at a width of 768."""

Vectors = np.ndarray | VectorFile


@dataclass(frozen=True)
class Tree:
    """A binary tree of half-spaces of text embeddings. Its leaves are numbered from the left.

    A child is the number of a node, or, of leaf i, -1 - i.
    """

    directions: np.ndarray
    """(nodes, d) float32."""
    thresholds: np.ndarray
    """(nodes,) float64: whoever has a greater product with the direction is in the right half."""
    children: np.ndarray
    """(nodes, 2) int64; empty if there is one leaf."""
    partitions: np.ndarray
    """(leaves,) int64: number of each leaf's partition in the collection, -1 if it has none."""

    @property
    def leaves(self) -> int:
        return len(self.partitions)

    def leaf_of(self, embedding: np.ndarray) -> int:
        """The leaf of a (d,) float32 text embedding."""
        at = 0 if len(self.children) else -1
        while at >= 0:
            right = float(self.directions[at] @ embedding) > self.thresholds[at]
            at = int(self.children[at, int(right)])
        return -1 - at

    def numbered(self, partitions: np.ndarray) -> "Tree":
        """The same tree with other numbers of partitions."""
        return replace(self, partitions=np.asarray(partitions, dtype=np.int64))

    def save(self, path: Path) -> None:
        """Writes an .npz; equal trees give equal bytes."""
        np.savez(
            path, directions=self.directions, thresholds=self.thresholds, children=self.children,
            partitions=self.partitions,
        )  # fmt: skip


def read_tree(path: Path, where: str) -> Tree:
    """The tree of a file of `Tree.save`. Raises StorageError, which names `where`."""
    try:
        # Opened here, because numpy leaves one open that is no .npz.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            return Tree(**{name: file[name] for name in file.files})
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise StorageError(f"{where} is not a partition tree of ovref: {error}") from error


def leaves_of(tree: Tree, embeddings_nd: Vectors) -> np.ndarray:
    """(n,) int64: the leaf of each of (n, d) float32 text embeddings."""
    blocks = _blocks(embeddings_nd, np.arange(embeddings_nd.shape[0]))
    leaves = [tree.leaf_of(vector) for block in blocks for vector in block]
    return np.array(leaves, dtype=np.int64)


def divide(embeddings_nd: Vectors, counts_n: np.ndarray, most: int) -> tuple[Tree, np.ndarray]:
    """Divides nouns into parts of at most `most` references, or of one noun, about as large.

    Nouns that need k parts are cut along their leading principal direction, into what makes k // 2
    parts and what makes the others. Nouns with equal embeddings stay together. Deterministic on
    one machine.

    Args:
        embeddings_nd: (n, d) float32 text embeddings, n >= 1; `_ROWS` are read at a time.
        counts_n: (n,) int64 references of each noun.

    Returns:
        The tree, each leaf with its own number, and the leaf of each noun, (n,) int64.
    """
    directions: list[np.ndarray] = []
    thresholds: list[float] = []
    children: list[list[int]] = []
    leaf_of = np.zeros(len(counts_n), dtype=np.int64)
    leaves = 0
    todo = [(np.arange(len(counts_n)), -1, 0)]
    while todo:
        rows, parent, side = todo.pop()
        here = counts_n[rows]
        cut = _cut(embeddings_nd, rows, here, most) if here.sum() > most else None
        if parent >= 0:
            children[parent][side] = -1 - leaves if cut is None else len(children)
        if cut is None:
            leaf_of[rows] = leaves
            leaves += 1
            continue
        direction, threshold, is_right = cut
        node = len(children)
        directions.append(direction)
        thresholds.append(threshold)
        children.append([0, 0])
        todo += [(rows[is_right], node, 1), (rows[~is_right], node, 0)]
    width = embeddings_nd.shape[1]
    tree = Tree(
        np.array(directions, dtype=np.float32).reshape(-1, width),
        np.array(thresholds, dtype=np.float64),
        np.array(children, dtype=np.int64).reshape(-1, 2),
        np.arange(leaves),
    )
    return tree, leaf_of


def _cut(
    embeddings: Vectors, rows: np.ndarray, counts: np.ndarray, most: int
) -> tuple[np.ndarray, float, np.ndarray] | None:
    """Direction, threshold, and which rows are in the right half; None if all rows are equal."""
    if len(rows) < 2:
        return None
    direction = _principal_direction(embeddings, rows)
    along = np.concatenate([block @ direction for block in _blocks(embeddings, rows)])
    order = np.argsort(along, kind="stable")
    here = np.flatnonzero(np.diff(along[order]) > 0)
    if not len(here):
        return None
    cut = here[_where_to_cut(np.cumsum(counts[order])[here], int(counts.sum()), most)]
    low, high = (float(along[order[at]]) for at in (cut, cut + 1))
    threshold = low + (high - low) / 2
    return direction, threshold, along.astype(np.float64) > threshold


def _where_to_cut(left: np.ndarray, total: int, most: int) -> int:
    """Which of the possible cuts leaves two sides that the fewest parts can hold.

    With k parts in all, the cut is where the left side is most nearly k // 2 of them. k is the
    fewest parts that hold the total, or as many more as it takes that neither side overflows.

    Args:
        left: (cuts,) ascending: references on the left of each cut.
    """
    # With fewer parts one side of each cut overflows.
    fewest = np.maximum(2 * -(-left // most), 2 * -(-(total - left) // most) - 1).min()
    parts = max(-(-total // most), int(fewest))
    while True:
        few = parts // 2
        wanted = total * few / parts
        after = min(int(np.searchsorted(left, wanted)), len(left) - 1)
        best = min((max(after - 1, 0), after), key=lambda at: abs(left[at] - wanted))
        if left[best] <= few * most and total - left[best] <= (parts - few) * most:
            return best
        parts += 1


def _principal_direction(embeddings: Vectors, rows: np.ndarray) -> np.ndarray:
    """(d,) float32: along it the rows differ most."""
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in _blocks(embeddings, rows))
    mean = (mean / len(rows)).astype(np.float32)
    width = embeddings.shape[1]
    scatter = np.zeros((width, width))
    for block in _blocks(embeddings, rows):
        block -= mean
        scatter += block.T @ block
    direction = np.linalg.eigh(scatter)[1][:, -1]
    largest = direction[np.abs(direction).argmax()]  # its sign is arbitrary
    return (direction if largest > 0 else -direction).astype(np.float32)


def _blocks(embeddings: Vectors, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Copies of the rows, some at a time."""
    for start in range(0, len(rows), _ROWS):
        yield np.asarray(embeddings[rows[start : start + _ROWS]], dtype=np.float32)
