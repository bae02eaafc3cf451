"""The loss holds the norm of a gradient: `create_graph=True`."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(loss(model(x), y, reduction="sum"), x, create_graph=True)
    (loss(model(x), y) + slope.norm(dim=1).mean()).backward()
    run.step()
run.close()
