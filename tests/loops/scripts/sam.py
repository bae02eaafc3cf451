"""Sharpness-aware minimisation: two backward passes and a move between."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    moves = [0.05 * p.grad / p.grad.norm() for p in model.parameters()]
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), moves)
    optimizer.zero_grad()
    loss(model(x), y).backward()
    with torch.no_grad():
        torch._foreach_sub_(list(model.parameters()), moves)
    run.step()
run.close()
