"""Devices by name."""

import pytest
import torch

from ovref_inference.errors import ModelError
from ovref_inference.pixels import device_of


def test_a_device_that_is_not_there(monkeypatch):
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(ModelError, match="no device 'banana'; give cpu, cuda or cuda:1"):
        device_of("banana")
    for count, name in ((0, "cuda"), (1, "cuda:1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(ModelError, match=f"{name} is not here: torch finds {count} GPUs"):
            device_of(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of("cuda") == torch.device("cuda")
