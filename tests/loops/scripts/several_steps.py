"""Three steps are taken with each batch, of which one rank has one more."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader, Subset

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(Subset(data, range(14)), batch_size=2)):
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        run.step()
run.close()
