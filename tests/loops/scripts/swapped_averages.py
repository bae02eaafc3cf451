"""Moving averages of the parameters are swapped in for an evaluation: `p.data = average`."""

import torch
from task import data, inputs, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
averages = {name: p.data.clone() for name, p in model.named_parameters()}
for _ in range(2):
    for x, y in run.batches(DataLoader(data, batch_size=4)):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        run.step()
        for name, p in model.named_parameters():
            averages[name] = 0.5 * averages[name] + 0.5 * p.data
    backup = {name: p.data for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data = averages[name]
    with run.averaged(), torch.no_grad():
        model(inputs)
    for name, p in model.named_parameters():
        p.data = backup[name]
run.close()
