"""How much work a reduction is: CPU seconds and requests, from what was measured."""

from dataclasses import dataclass
from math import ceil

from ovref.reduce.list_index import LEAST_LISTS
from ovref.reduce.scatter import GROUP_ROWS, NOUNS_A_TASK
from ovref_inference.collection.index import RECALL_QUERIES, choose_index, list_count

REDUCE_SECONDS = 3.1e-7
"""CPU seconds for each number of an embedding, from reference shards to an undivided collection."""
PARTITION_SECONDS = 2.7e-7
"""The same for the tasks that make partitions of what was scattered."""
SCATTER_SECONDS = 0.52e-7
"""The same for counting and scattering."""
PLAN_SECONDS = 1.8e-7
"""CPU seconds of the plan for each number of a noun's text embedding."""
SHARD_SECONDS = 1e-3
"""CPU seconds of the driver for each reference shard, whose marker it reads."""
COUNTED_SECONDS = 1e-6
"""CPU seconds of the driver for each reference, whose counted nouns it adds up."""
REQUESTS_A_SHARD = 14
"""One for its marker, and those of the tasks that count and scatter."""
REQUESTS_A_PART = 5
"""For what a partition reads of each group of shards."""
REQUESTS_A_PARTITION = 36
"""Beside that, most of them to publish it."""

LIST_SECONDS = 5.5e-7
"""CPU seconds for each number of a centroid in the index over all inverted lists, of 27,000 to
410,000 of them (`tests/benchmarks/results/partitioned_lists.md`)."""
REQUESTS_A_LISTED_PARTITION = 2
"""For each kind of embedding, to read its centroids; those of the queries come on top."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a whole reduction takes."""

    worker_seconds: float
    """CPU seconds of tasks, which workers share."""
    driver_seconds: float
    """CPU seconds on one machine, while workers wait."""
    requests: float
    """To the object store; not estimated of an undivided collection, and 0."""
    list_index_bytes: float = 0.0
    """Size of the indexes over the inverted lists of all partitions."""


def work_of(
    *, references: float, nouns: float, shards: float, visual: int, textual: int,
    noun_seconds: float, most: int | None,
) -> Work:  # fmt: skip
    """The work of a reduction. CPU seconds are those of 20,000 to 5 million references of 2 x 768
    numbers, requests those of 24,000 references (`tests/benchmarks/results/reduce_partitioned.md`).

    Args:
        shards: of the references.
        visual, textual: numbers of an embedding.
        noun_seconds: to encode a noun.
        most: references of a partition; None makes an undivided collection.
    """
    numbers = references * (visual + textual)
    if most is None:
        return Work(
            worker_seconds=numbers * REDUCE_SECONDS, driver_seconds=nouns * noun_seconds,
            requests=0.0,
        )  # fmt: skip
    groups, partitions = ceil(references / GROUP_ROWS), max(1, ceil(references / most))
    plan = nouns * textual * PLAN_SECONDS
    read = groups + nouns / NOUNS_A_TASK  # files of counts and of embeddings
    lists = partitions * list_count(choose_index(max(1, ceil(references / partitions)), textual))
    if lists < LEAST_LISTS:
        lists = 0
    listed = 2 * (partitions * REQUESTS_A_LISTED_PARTITION + RECALL_QUERIES) if lists else 0
    of_centroids = lists * (visual + textual)
    return Work(
        worker_seconds=numbers * (SCATTER_SECONDS + PARTITION_SECONDS)
        + nouns * noun_seconds
        + of_centroids * LIST_SECONDS,
        driver_seconds=plan + shards * SHARD_SECONDS + references * COUNTED_SECONDS,
        requests=shards * REQUESTS_A_SHARD
        + partitions * (groups * REQUESTS_A_PART + REQUESTS_A_PARTITION)
        + 3 * read
        + listed,
        list_index_bytes=1.0 * of_centroids,
    )
