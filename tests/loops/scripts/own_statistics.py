"""`averaged()` gives back the statistics of this rank."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
model.insert(1, torch.nn.BatchNorm1d(16))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
before = model[1].running_mean.clone()
with run.averaged():
    pass
assert model[1].running_mean.equal(before)
run.close()
