"""A streaming data set of a hub: no length, `set_epoch` shuffles it anew."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader, IterableDataset

import hpcsgd


class Stream(IterableDataset):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for i in torch.arange(96).roll(7 * self.epoch)[run.worker :: run.workers]:
            yield data[int(i)]


model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
loader = DataLoader(Stream(), batch_size=4)
for loader.dataset.epoch in range(2):
    for x, y in run.batches(loader):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        run.step()
run.close()
