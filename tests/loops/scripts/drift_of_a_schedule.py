"""A schedule is stepped on rank 0 alone."""

import torch
from mpi4py import MPI
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer, check_every=4)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
    if MPI.COMM_WORLD.rank == 0:
        schedule.step()
run.close()
