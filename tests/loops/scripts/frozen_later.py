"""A layer is frozen in the middle, with momentum."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for i, (x, y) in enumerate(run.batches(DataLoader(data, batch_size=4))):
    if i == 2:
        model[0].requires_grad_(False)
        optimizer.zero_grad()
        frozen = model[0].weight.clone()
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
