"""Threads, generators and the default dtype of the process stay."""

import torch
from task import data, loss, net

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
torch.set_num_threads(2)
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches([data[run.worker :: run.workers]] * 4, steps=4):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
assert torch.get_rng_state().equal(before[0])
assert (torch.get_num_threads(), torch.get_default_dtype()) == before[1:]
torch.set_num_threads(1)
