"""Gradients have another dtype than the parameters: `grad_dtype`."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net().bfloat16()
for parameter in model.parameters():
    parameter.grad_dtype = torch.float32
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x.bfloat16()).float(), y).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    run.step()
run.close()
