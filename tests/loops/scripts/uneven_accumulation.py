"""Gradients of two batches add up to one step, and one rank has one batch more than the others."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader, Subset

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
batches = 0
for x, y in run.batches(DataLoader(Subset(data, range(14)), batch_size=2)):
    with run.accumulate():
        (loss(model(x), y) / 2).backward()
    batches += 1
    if batches % 2 == 0:
        run.step()
        optimizer.zero_grad()
if batches % 2:
    run.step()
run.close()
