"""Measure PyTorch: same network and update, fixed batch, without input."""

import sys

import torch
import torch.nn.functional as F  # noqa: N812
from timing import BATCH_SIZE, run_steps
from torch import nn


def local_response_norm(x):
  """Sum the squares of adjacent channels by a 1x1 convolution.

  This is faster than `F.local_response_norm`, which pools over all channels.
  """
  channels = torch.arange(x.shape[1])
  near = (channels - channels[:, None]).abs() <= 4
  weights = near[:, :, None, None].to(x.dtype)
  sums = F.conv2d(x.square(), weights)
  return x * (1 + 0.001 / 9 * sums).pow(-0.75)


class Network(nn.Module):
  def __init__(self):
    super().__init__()
    self.conv1 = nn.Conv2d(3, 64, 5, padding=2)
    self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
    self.local3 = nn.Linear(2304, 384)
    self.local4 = nn.Linear(384, 192)
    self.softmax_linear = nn.Linear(192, 10)
    for layer, stddev, bias in [
      (self.conv1, 0.05, 0.0),
      (self.conv2, 0.05, 0.1),
      (self.local3, 0.04, 0.1),
      (self.local4, 0.04, 0.1),
      (self.softmax_linear, 1 / 192, 0.0),
    ]:
      nn.init.trunc_normal_(layer.weight, 0, stddev, -2 * stddev, 2 * stddev)
      nn.init.constant_(layer.bias, bias)

  def forward(self, x):
    x = F.max_pool2d(F.relu(self.conv1(x)), 3, stride=2, padding=1)
    x = local_response_norm(x)
    x = F.relu(self.conv2(x))
    x = local_response_norm(x)
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    x = F.relu(self.local3(torch.flatten(x, 1)))
    return self.softmax_linear(F.relu(self.local4(x)).float())


def main(precision, mode):
  torch.manual_seed(1)
  network = Network().to(memory_format=torch.channels_last)
  images = torch.randn(BATCH_SIZE, 3, 24, 24)
  images = images.to(memory_format=torch.channels_last)
  labels = torch.randint(0, 10, [BATCH_SIZE])
  optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
  variables = [p.detach() for p in network.parameters()]
  averages = [variable.clone() for variable in variables]

  def loss_of(images, labels):
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
      logits = network(images)
    decay = sum(
      layer.weight.square().sum() for layer in (network.local3, network.local4)
    )
    return F.cross_entropy(logits, labels) + 0.004 / 2 * decay

  if mode == 'compiled':
    loss_of = torch.compile(loss_of)

  def step():
    optimizer.zero_grad()
    loss_of(images, labels).backward()
    optimizer.step()
    torch._foreach_lerp_(averages, variables, 1e-4)

  run_steps(step)


if __name__ == '__main__':
  main(*sys.argv[1:])
