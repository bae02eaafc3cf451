"""ReduceLROnPlateau follows the loss of each rank."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer, check_every=4)
schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    run.step()
    schedule.step(value.item() if run.worker else 1 / (1 + run.steps))
run.close()
