"""A list of batches that is the same on all ranks."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(list(DataLoader(data, batch_size=4))):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
