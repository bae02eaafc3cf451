"""The batches of the run take the place of the loader once, before the epochs."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
loader = run.batches(DataLoader(data, batch_size=4))
for _ in range(3):
    for x, y in loader:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        run.step()
run.close()
