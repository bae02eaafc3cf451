"""An optimizer that keeps its step size in its group, as Prodigy and D-Adaptation do."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd


class Estimating(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            squares = sum(p.grad.square().sum().item() for p in group["params"])
            group["seen"] = group.get("seen", 0.0) + squares
            group["lr"] = min(0.2, 0.3 / (1.0 + group["seen"]) ** 0.5)
        return super().step(closure)


model = net()
optimizer = Estimating(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
