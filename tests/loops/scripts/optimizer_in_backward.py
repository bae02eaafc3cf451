"""A hook steps an optimizer of each parameter during backward."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
run = hpcsgd.Run(model, list(optimizers.values()))
for parameter in model.parameters():
    parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
for x, y in run.batches(DataLoader(data, batch_size=4)):
    loss(model(x), y).backward()
    run.zero_grad()
run.close()
