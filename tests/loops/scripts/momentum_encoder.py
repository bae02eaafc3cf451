"""A frozen copy of a layer follows it, as the target network of MoCo, BYOL or DQN."""

import copy

import torch
from task import data, loss, net
from torch import nn
from torch.utils.data import DataLoader

import hpcsgd

model = nn.ModuleDict({"online": net()})
model["target"] = copy.deepcopy(model["online"]).requires_grad_(False)
optimizer = torch.optim.SGD(model["online"].parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    wanted = model["target"](x).softmax(1)
    (loss(model["online"](x), y) + 0.1 * loss(model["online"](x), wanted)).backward()
    run.step()
    with torch.no_grad():
        for slow, fast in zip(model["target"].parameters(), model["online"].parameters(), strict=True):
            slow.lerp_(fast, 0.1)
run.close()
