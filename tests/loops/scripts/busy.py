"""Rank 0 validates and saves while the others wait."""

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
    run.step()
    if run.worker == 0 and run.steps % 4 == 0:
        with run.busy("validation"), torch.no_grad():
            loss(model(data.tensors[0]), data.tensors[1])
run.close()
