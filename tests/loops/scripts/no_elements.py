"""A parameter of no elements, as of an empty adapter."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
model.adapter = torch.nn.Parameter(torch.empty(0, 8))
trained = model[:3]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(trained(x), y).backward()
    run.step()
run.close()
