"""Gradients of two batches add up to one step."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for i, (x, y) in enumerate(run.batches(DataLoader(data, batch_size=4))):
    if i % 2 == 0:
        optimizer.zero_grad()
        with run.accumulate():
            loss(model(x), y).backward()
    else:
        loss(model(x), y).backward()
        run.step()
run.close()
