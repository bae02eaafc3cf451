"""One rank changes a weight."""

import torch
from mpi4py import MPI
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer, check_every=4)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
    if run.steps == 2 and MPI.COMM_WORLD.rank == 1:
        model[0].bias.data += 0.001
run.close()
