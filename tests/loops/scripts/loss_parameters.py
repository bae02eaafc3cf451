"""The loss has a parameter that only the optimizer holds."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model, temperature = net(), torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
run = hpcsgd.Run(model, optimizer)
log = []
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x) * temperature, y).backward()
    run.step()
run.close()
log.extend(temperature.tolist())
