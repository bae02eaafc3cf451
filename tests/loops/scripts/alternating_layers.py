"""Two layers train in turn, the other one is frozen; the second is frozen at the start."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model[2].requires_grad_(False)
run = hpcsgd.Run(model, optimizer)
for epoch in range(4):
    model[0].requires_grad_(epoch % 2 == 0)
    model[2].requires_grad_(epoch % 2 == 1)
    for x, y in run.batches(DataLoader(data, batch_size=8)):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        run.step()
run.close()
