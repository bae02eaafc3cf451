"""Ranks 1 and up train in a communicator of their own."""

import torch
from mpi4py import MPI
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
part = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank > 0)
run = hpcsgd.Run(model, optimizer, comm=part)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
part.Free()
