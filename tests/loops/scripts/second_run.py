"""Two runs train one model, one for each optimizer."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
first = hpcsgd.Run(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
second = hpcsgd.Run(model, torch.optim.SGD(model[2].parameters(), lr=0.1))
for x, y in first.batches(DataLoader(data, batch_size=4)):
    first.zero_grad()
    second.zero_grad()
    loss(model(x), y).backward()
    first.step()
    second.step()
first.close()
second.close()
