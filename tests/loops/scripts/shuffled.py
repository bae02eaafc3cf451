"""PyTorch's usual loader, shuffled, for two epochs."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
loader = DataLoader(data, batch_size=4, shuffle=True)
for _ in range(2):
    for x, y in run.batches(loader):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        run.step()
run.close()
