"""Settings for the whole suite, made before anything imports triton."""

import os

# The Triton kernels run in their interpreter here; with a GPU they run on it (tests/gpu).
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
