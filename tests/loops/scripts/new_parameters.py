"""`load_state_dict(assign=True)` in mid-training: the optimizer keeps the former parameters."""

import copy

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for i, (x, y) in enumerate(run.batches(DataLoader(data, batch_size=4))):
    if i == 1:
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.check()
run.close()
