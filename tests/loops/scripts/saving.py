"""Files inside `averaged()` and after the end are of the size of their tensors."""

import copy
import io

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)


def check():
    for object in (model[2].state_dict(), model[2], copy.deepcopy(model[2])):
        torch.save(object, file := io.BytesIO())
        assert file.tell() < 4096
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 4


for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
with run.averaged():
    check()
run.close()
