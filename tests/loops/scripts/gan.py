"""A generator and a critic: two runs, and gradients that `zero_grad` throws away."""

import torch
from task import data
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

import hpcsgd

torch.manual_seed(0)
generator, critic = torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
g_run = hpcsgd.Run(generator, torch.optim.SGD(generator.parameters(), lr=0.05))
c_run = hpcsgd.Run(critic, torch.optim.SGD(critic.parameters(), lr=0.05))
for real, _ in c_run.batches(DataLoader(data, batch_size=4)):
    fake = generator(real.roll(1, 1))
    c_run.zero_grad()
    (softplus(-critic(real)).mean() + softplus(critic(fake.detach())).mean()).backward()
    c_run.step()
    g_run.zero_grad()
    (-critic(fake).mean()).backward()
    g_run.step()
c_run.close()
g_run.close()
