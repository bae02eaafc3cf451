"""Gradients are replaced by their signs, as sign SGD does."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    for parameter in model.parameters():
        parameter.grad = parameter.grad.sign() / 10
    run.step()
run.close()
