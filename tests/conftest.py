"""One thread: the tensors are small, and results then do not depend on the machine's load."""

import torch

torch.set_num_threads(1)
