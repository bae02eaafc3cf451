"""`torch.set_default_device` is set during training."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

torch.set_default_device("cpu")
model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
assert torch.get_default_device() == torch.device("cpu")
torch.set_default_device(None)
