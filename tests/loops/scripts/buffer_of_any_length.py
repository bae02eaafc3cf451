"""A buffer as long as the batches that this rank has seen."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
model.register_buffer("history", torch.zeros(0))
trained = model[:3]
optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    model.history = torch.cat([model.history, x[x[:, 0] > 0, 0]])
    optimizer.zero_grad()
    loss(trained(x), y).backward()
    run.step()
run.close()
