"""The counts of a step as Ray metrics, which each node exports to Prometheus."""

from ray.util.metrics import Counter, Gauge

SHARDS = "ovref_shards_total"
INPUTS = "ovref_input_records_total"
OUTPUTS = "ovref_output_records_total"
DROPS = "ovref_drops_total"
TROUBLE = "ovref_trouble_total"
WAITING = "ovref_shards_waiting"
WORKERS = "ovref_workers"
RATE = "ovref_input_records_per_second"


class RayMeter:
    """A `progress.Meter`. In Prometheus, images a second are
    `rate(ray_ovref_output_records_total{step="images"}[30m])`; references likewise."""

    def __init__(self, step: str, build: str) -> None:
        """All metrics have the tags `step` and `build` (URL of the build's output). Ray must have
        been joined."""
        tags_of_all = {"step": step, "build": build}

        def counter(name: str, description: str, *tags: str) -> Counter:
            made = Counter(name.removesuffix("_total"), description, tag_keys=(*tags_of_all, *tags))
            made.set_default_tags(tags_of_all)
            return made

        def gauge(name: str, description: str) -> Gauge:
            made = Gauge(name, description, tag_keys=tuple(tags_of_all))
            made.set_default_tags(tags_of_all)
            return made

        self._shards = counter(SHARDS, "Shards committed.")
        self._inputs = counter(INPUTS, "Records read by committed shards.")
        self._outputs = counter(OUTPUTS, "Records written by committed shards.")
        self._drops = counter(DROPS, "Records and regions dropped.", "reason")
        self._trouble = counter(TROUBLE, "Errors, worker deaths, node losses.", "what")
        self._waiting = gauge(WAITING, "Shards waiting for a worker.")
        self._workers = gauge(WORKERS, "Workers with loaded models.")
        self._rate = gauge(RATE, "Input records per second over the recent shards.")

    def finished(self, inputs: int, outputs: int, dropped: dict[str, int]) -> None:
        """A shard is committed."""
        self._shards.inc(1)
        for counter, count in ((self._inputs, inputs), (self._outputs, outputs)):
            if count:
                counter.inc(count)
        for reason, count in dropped.items():
            self._drops.inc(count, tags={"reason": reason})

    def failed(self, what: str) -> None:
        """One of `Ledger.tallies` has grown."""
        self._trouble.inc(1, tags={"what": what})

    def update_state(self, shards_waiting: int, workers: int, records_per_second: float) -> None:
        """Current state of the step."""
        self._waiting.set(shards_waiting)
        self._workers.set(workers)
        self._rate.set(records_per_second)
