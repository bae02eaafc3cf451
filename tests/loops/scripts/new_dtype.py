"""The model becomes float64 in the middle."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for i, (x, y) in enumerate(run.batches(DataLoader(data, batch_size=4))):
    if i == 2:
        model.double()
    optimizer.zero_grad()
    loss(model(x.to(model[0].weight.dtype)), y).backward()
    run.step()
run.close()
