"""A model of TorchScript."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

torch._C._jit_set_profiling_executor(False)  # its first passes have other bits than the later ones
model = torch.jit.script(net())
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
