"""Each epoch ends with the loss of the consensus model on all data, a part of it on each rank."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
log = []
for _ in range(2):
    for x, y in run.batches(DataLoader(data, batch_size=4)):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        run.step()
    with run.averaged(), torch.no_grad():
        losses = [float(loss(model(x), y)) for x, y in run.batches(DataLoader(data, batch_size=4))]
    log.append(run.mean(sum(losses) / max(1, len(losses))))
run.close()
