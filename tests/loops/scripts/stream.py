"""A stream without a length."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader, IterableDataset

import hpcsgd


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(run.worker, len(data), run.workers):
            yield data[i]


model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(Stream(), batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
