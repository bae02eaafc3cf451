"""A wrapper looks one batch ahead, to know the last one, and one rank has a batch more than the others."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader, Subset

import hpcsgd


def with_last(batches):
    for before in batches:
        for batch in batches:
            yield before, False
            before = batch
        yield before, True


model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
run = hpcsgd.Run(model, optimizer)
loader = DataLoader(Subset(data, range(28)), batch_size=4)
for _ in range(2):
    for (x, y), is_last in with_last(iter(run.batches(loader))):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        run.step()
        if is_last:
            scheduler.step()
run.close()
