"""Imported by a fork server: everything that a first training step loads, once for all children."""

import torch
from support.training import run_here, settings, upscaler

torch.set_num_threads(1)
run_here(settings(iterations=1, save_every=0), upscaler(bits=4))
