"""Tests run on one thread: tiny tensors are not worth a second one, and machines are shared."""

import torch

torch.set_num_threads(1)
