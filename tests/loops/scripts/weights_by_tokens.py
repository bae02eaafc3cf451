"""Losses are means over the tokens that count."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    counts = x[:, 0] > 0
    optimizer.zero_grad()
    (loss(model(x), y, reduction="none") * counts).sum().div(counts.sum().clamp(min=1)).backward()
    run.step(weight=float(counts.sum()))
run.close()
