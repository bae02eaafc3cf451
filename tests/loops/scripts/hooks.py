"""Hooks of parameters halve each gradient and count the passes."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
passes = []
for parameter in model.parameters():
    parameter.register_hook(lambda gradient: gradient / 2)
    parameter.register_post_accumulate_grad_hook(lambda p: passes.append(p.shape))
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
assert len(passes) % 4 == 0
