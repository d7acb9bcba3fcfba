"""Enough of Ray, in threads of this process, to watch how the driver places and gives out work.

Nodes have CPUs and GPUs, actors wait for room, calls run one after another in a thread of their
actor. A stage that raises `ActorGone` takes its actor down; `kill_node` takes a node down.
"""

import contextlib
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from ray.exceptions import RayActorError


class ActorGone(BaseException):
    """What `os._exit` is to a process."""


@dataclass
class Node:
    cpus: float
    gpus: float = 0.0
    alive: bool = True
    leaving: bool = False
    actors: list = field(default_factory=list)

    def free(self):
        return (
            self.cpus - sum(actor.options["num_cpus"] for actor in self.actors),
            self.gpus - sum(actor.options["num_gpus"] for actor in self.actors),
        )


class Actor:
    def __init__(self, ray, cls, options):
        self.ray, self.options, self.node_name = ray, options, None
        self.dead = False
        self._object = cls()
        self._thread = ThreadPoolExecutor(1)
        self._futures = []
        self.calls = []

    def __getattr__(self, name):
        if name not in ("where", "load", "run"):
            raise AttributeError(name)
        return Method(self, name)

    def call(self, name, arguments):
        future = Future()
        self._futures.append(future)
        self.calls.append((name, arguments))
        self._thread.submit(self._carry_out, future, name, arguments)
        return future

    def _carry_out(self, future, name, arguments):
        while not self.dead and self.node_name is None:
            self.ray.place(self)
            time.sleep(0.001)
        if self.dead:
            self.die()  # a call of an actor that is gone already
            return
        self.ray.current.actor = self
        try:
            answer = getattr(self._object, name)(*arguments)
        except ActorGone:
            self.die()
            return
        with contextlib.suppress(Exception):  # the actor was killed meanwhile
            future.set_result(answer)

    def die(self):
        self.dead = True
        with self.ray.lock:
            for node in self.ray.nodes_by_name.values():
                if self in node.actors:
                    node.actors.remove(self)
        for future in self._futures:
            if not future.done():
                with contextlib.suppress(Exception):
                    future.set_exception(RayActorError(error_msg="the actor is gone"))


@dataclass
class Method:
    actor: Actor
    name: str

    def remote(self, *arguments):
        return self.actor.call(self.name, arguments)


class FakeTable:
    """Stands for the table that Ray's head keeps (`ray.experimental.internal_kv`)."""

    def __init__(self):
        self.entries = {}

    def _internal_kv_put(self, key, value, *, namespace):
        self.entries[namespace, key] = value

    def _internal_kv_get(self, key, *, namespace):
        return self.entries.get((namespace, key))

    def _internal_kv_del(self, key, *, namespace):
        self.entries.pop((namespace, key), None)


class FakeRay:
    """Stands for the module `ray` in the engine and its workers, and for what `ray_cluster` asks
    it. Nodes are named by one letter from a to f."""

    def __init__(self, **nodes):
        self.nodes_by_name = nodes
        self.ids = {name: name * 56 for name in nodes}  # as long as Ray wants them, and hexadecimal
        self.lock = threading.RLock()
        self.current = threading.local()
        self.hired = []

    # -- as ray ------------------------------------------------------------------------------

    def remote(self, cls):
        ray = self

        class Remote:
            @staticmethod
            def options(**options):
                class Options:
                    @staticmethod
                    def remote():
                        actor = Actor(ray, cls, options)
                        ray.hired.append(actor)
                        return actor

                return Options

        return Remote

    def wait(self, futures, num_returns, timeout):
        done, rest = wait(futures, timeout, FIRST_COMPLETED)
        first = [future for future in futures if future in done][:num_returns]
        return first, [*rest]

    def get(self, future):
        return future.result()

    def kill(self, actor):
        actor.die()

    def get_runtime_context(self):
        return self

    def get_node_id(self):
        return self.ids[self.current.actor.node_name]

    # -- as ray_cluster ----------------------------------------------------------------------

    def place(self, actor):
        """Puts an actor on the first node with room for it, if there is one."""
        wanted = getattr(actor.options["scheduling_strategy"], "node_id", None)
        with self.lock:
            for name, node in self.nodes_by_name.items():
                cpus, gpus = node.free()
                room = cpus >= actor.options["num_cpus"] and gpus >= actor.options["num_gpus"]
                if node.alive and not node.leaving and room and wanted in (None, self.ids[name]):
                    node.actors.append(actor)
                    actor.node_name = name
                    return

    def living_nodes(self):
        return {self.ids[name] for name, node in self.nodes_by_name.items() if node.alive}

    def leaving_nodes(self):
        return {self.ids[name] for name, node in self.nodes_by_name.items() if node.leaving}

    def free_resources(self):
        free = {self.ids[name]: node.free() for name, node in self.nodes_by_name.items()}
        return {node: {"CPU": cpus, "GPU": gpus} for node, (cpus, gpus) in free.items()}

    def kill_node(self, name):
        node = self.nodes_by_name[name]
        node.alive = False
        for actor in list(node.actors):
            actor.die()
