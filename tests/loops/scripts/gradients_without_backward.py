"""Gradients of two losses by `torch.autograd.grad` are combined and set, as gradient surgery does."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    outputs = model(x)
    first = torch.autograd.grad(loss(outputs, y), list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(outputs.square().mean(), list(model.parameters()))
    for parameter, a, b in zip(model.parameters(), first, second, strict=True):
        parameter.grad = a + b / 10
    run.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    run.step()
run.close()
