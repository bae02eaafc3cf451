"""A layer is unfrozen in the middle, with a group of its own."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
model[0].requires_grad_(False)
optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for i, (x, y) in enumerate(run.batches(DataLoader(data, batch_size=4))):
    if i == 2:
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
