"""A CUDA device that is not there: tensors that say they are on it, with values kept on the CPU.

Code that takes the CUDA device where there is one runs as on a card, and its results are those of
the CPU. As on a card, an operation on tensors of both places is refused, and so is handing a tensor
of the card to numpy. Every wait for the card is noted: numbers read back, copies in either
direction. Kernels, memory and speed are not pretended.
"""

import contextlib
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CARD = torch.device("cuda", 0)
FREE_BYTES = 1 << 30
"""Memory of the card that is free, as far as anybody asks; it is not enforced."""
TAKES_HOST_INDICES = ("aten::index", "aten::index_put", "aten::index_put_")
COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")
READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal")
SIZED_BY_VALUES = ("aten::nonzero", "aten::masked_select", "torchvision::nms", "aten::unique")


class OnCard(torch.Tensor):
    """A tensor that says it is on the card."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "OnCard":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CARD,
        )

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> "OnCard":
        return self.detach()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the card outside of `pretend_cuda`")


class Card(TorchDispatchMode):
    """Runs what is asked of the card on the CPU."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits
        """For each wait the operation and the line of the code that asked for it."""

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Inside the block there is none."""
        available, torch.cuda.is_available = torch.cuda.is_available, lambda: False
        try:
            yield
        finally:
            torch.cuda.is_available = available

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("device")
        if OnCard not in types and (wanted is None or torch.device(wanted).type != "cuda"):
            return func(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        tensors = [item for item in flat if isinstance(item, torch.Tensor)]
        on_card = [item for item in tensors if isinstance(item, OnCard)]
        name = func._schema.name
        if name == "aten::copy_":
            self._note(name, len({item.device.type for item in args[:2]}) == 2)
        elif wanted is not None and tensors:
            crosses = (torch.device(wanted).type == "cuda") != bool(on_card)
            self._note(name, crosses and name in COPIES and not kwargs.get("non_blocking"))
        elif on_card:
            host = [item for item in tensors if not isinstance(item, OnCard)]
            if name in TAKES_HOST_INDICES:
                self._note(name, any(item.ndim for item in host))
            elif any(item.ndim for item in host) or (host and max(t.ndim for t in on_card) == 0):
                raise RuntimeError(f"{func} of tensors on cuda:0 and on the cpu")
            booleans = name in TAKES_HOST_INDICES and any(
                t.dtype == torch.bool for t in tensors[1:]
            )
            self._note(name, name in READS or name in SIZED_BY_VALUES or booleans)
        to_card = bool(on_card) if wanted is None else torch.device(wanted).type == "cuda"
        if wanted is not None and to_card:
            flat, spec = tree_flatten((args, {**kwargs, "device": "cpu"}))
        plain = [item.values if isinstance(item, OnCard) else item for item in flat]
        plain_args, plain_kwargs = tree_unflatten(plain, spec)
        plain_kwargs.pop("pin_memory", None)
        found = func(*plain_args, **plain_kwargs)
        if any(found is item for item in plain):  # in place, or given back as it is
            (place, *_) = [n for n, item in enumerate(plain) if item is found]
            if not isinstance(flat[place], torch.Tensor):
                return found
            if isinstance(flat[place], OnCard) == to_card or name == "aten::copy_":
                return flat[place]
            found = found.clone()
        if not to_card:
            return found
        with torch.inference_mode(False):  # a view of a tensor made outside of it cannot be inside
            return tree_map(lambda i: OnCard(i) if type(i) is torch.Tensor else i, found)

    def _note(self, name: str, waits: bool) -> None:
        if waits:
            lines = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
            lines = [f for f in lines if f.filename != __file__]
            self.waits.append(f"{name} at {lines[-1].filename}:{lines[-1].lineno}")


class _Driver(TorchFunctionMode):
    """What asks the card's driver before any operation is run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None:
            where = kwargs.pop("device")
            return func(*args, **kwargs).to(where)
        if func is torch.Tensor.tolist and isinstance(args[0], OnCard):
            return args[0].cpu().tolist()
        if func is functional.scaled_dot_product_attention and isinstance(args[0], OnCard):
            if not all(isinstance(item, OnCard) for item in args[:3]):
                raise RuntimeError("attention of tensors on cuda:0 and on the cpu")
            args, kwargs = tree_map(_values, (args, kwargs or {}))
            return OnCard(func(*args, **kwargs))
        return func(*args, **(kwargs or {}))


def _values(item: Any) -> Any:
    return item.values if isinstance(item, OnCard) else item


@contextlib.contextmanager
def pretend_cuda(patch: Any) -> Iterator[Card]:
    """Inside the block there is a CUDA device.

    Args:
        patch: pytest's `MonkeyPatch`, whose changes last as long as its test.
    """
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (FREE_BYTES, 2 * FREE_BYTES))
    # Or a module would keep its parameters, of another class, and take over what they hold.
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    torch._C._ensureCUDADeviceGuardSet()
    waits: list[str] = []
    run = threading.Thread.run

    def run_with_card(thread: threading.Thread) -> None:  # modes are each thread's own
        with Card(waits), _Driver():
            run(thread)

    patch.setattr(threading.Thread, "run", run_with_card)
    with Card(waits) as card, _Driver():
        yield card
