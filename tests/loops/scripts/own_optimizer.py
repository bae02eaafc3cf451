"""An optimizer of one's own, with the usual four methods."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd


class Descent:
    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]
        self.zero_grad = lambda set_to_none=True: model.zero_grad(set_to_none)
        self.state_dict = lambda: {"rate": self.param_groups[0]["lr"]}
        self.load_state_dict = lambda state: self.param_groups[0].update(lr=state["rate"])

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter -= self.param_groups[0]["lr"] * parameter.grad


model = net()
optimizer = Descent(model.parameters())
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
