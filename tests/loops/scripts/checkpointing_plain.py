"""Activation checkpointing, `use_reentrant=False`, of a layer used twice."""

import torch
from task import data, loss, net
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import hpcsgd

model = net()
model.insert(2, torch.nn.Linear(16, 16))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    hidden = model[:2](x)
    for _ in range(2):
        hidden = checkpoint(model[2], hidden, use_reentrant=False)
    loss(model[3](hidden), y).backward()
    run.step()
run.close()
