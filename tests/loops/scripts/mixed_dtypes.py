"""Layers of bfloat16 between layers of float32."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
model.insert(2, torch.nn.Linear(16, 16).bfloat16())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model[3](model[2](model[:2](x).bfloat16()).float()), y).backward()
    run.step()
run.close()
