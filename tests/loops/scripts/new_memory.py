"""The model gets other memory in the middle, by five ways."""

import torch
from task import data, loss, net
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
ways = [
    lambda: model.double().float(),
    lambda: vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters()),
    lambda: setattr(model[0].weight, "data", model[0].weight.data.clone()),
    lambda: model.to(memory_format=torch.preserve_format),
    lambda: model.share_memory(),
]
for i, (x, y) in enumerate(run.batches(DataLoader(data, batch_size=4))):
    ways[i % 5]()
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
