"""A DistributedSampler of the user's own."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader, DistributedSampler

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
loader = DataLoader(
    data, batch_size=4, sampler=DistributedSampler(data, run.workers, run.worker, shuffle=False)
)
for x, y in run.batches(loader):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
