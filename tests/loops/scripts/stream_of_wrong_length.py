"""A stream whose length is wrong, ended by `steps`."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader, IterableDataset

import hpcsgd


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(run.worker, len(data), run.workers):
            yield data[i]

    def __len__(self):
        return 1000


model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(Stream(), batch_size=4), steps=6):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
