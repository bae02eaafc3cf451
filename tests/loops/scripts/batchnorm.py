"""Batch normalisation over the batches of all ranks."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
model.insert(0, torch.nn.BatchNorm1d(8))
model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
