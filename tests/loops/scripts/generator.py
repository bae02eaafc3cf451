"""A generator of batches."""

import torch
from task import data, loss, net

import hpcsgd


def batches():
    own = torch.arange(run.worker, 96, run.workers)
    for indices in own.split(24 // run.workers):
        yield data[indices]


model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(batches()):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
