"""The stand-in for a GPU itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.standin
DEVICE = "standin"


def test_work_is_done_when_something_waits_for_it() -> None:
    host, here = torch.zeros(3, device="cpu"), torch.ones(3, device=DEVICE)
    host.copy_(here, non_blocking=True)
    assert not host.any()
    torch.get_device_module(DEVICE).current_stream().synchronize()
    assert host.all()


@pytest.mark.parametrize("ordered", [True, False])
def test_only_events_order_streams(ordered: bool) -> None:
    module, wrong = torch.get_device_module(DEVICE), 0
    side = module.Stream()
    values = torch.zeros(8, device=DEVICE)
    for number in range(1, 40):
        values.fill_(number)
        event = module.current_stream().record_event()
        with module.stream(side):
            if ordered:
                event.wait(side)
            copied = values.clone()
            side.synchronize()
            wrong += float(copied.cpu()[0]) != number
    assert (wrong == 0) == ordered


def test_freed_memory_is_not_read() -> None:
    module = torch.get_device_module(DEVICE)
    side, wrong = module.Stream(), 0
    for _ in range(40):
        values = torch.ones(8, device=DEVICE)
        module.synchronize()
        with module.stream(side):
            copied = values.clone()
        del values  # the stream that has allocated it may use its memory again
        torch.zeros(1, device=DEVICE).cpu()
        side.synchronize()
        wrong += bool(copied.cpu().isnan().any())
    assert wrong


def test_the_host_cannot_read_it() -> None:
    values = torch.ones(3, device=DEVICE)
    with pytest.raises(TypeError, match="convert standin"):
        values.numpy()


def test_training_is_that_of_the_cpu() -> None:
    def train(device: str) -> list[torch.Tensor]:
        with torch.device("cpu"):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
            )
            x, y = torch.randn(8, 1, 8, 8), torch.randint(5, (8,))
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return [value.cpu() for value in model.state_dict().values()]

    for there, here in zip(train(DEVICE), train("cpu"), strict=True):
        torch.testing.assert_close(there, here, rtol=2e-3, atol=2e-3)
