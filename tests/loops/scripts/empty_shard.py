"""A rank has no batch at all."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
own = [] if run.worker == run.workers - 1 > 0 else DataLoader(data, batch_size=4)
for x, y in run.batches(own):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
