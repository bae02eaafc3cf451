"""A loader whose last batch is smaller and whose batches do not divide by the ranks."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader, Subset

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(Subset(data, range(90)), batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step(weight=run.weight * len(x))
run.close()
