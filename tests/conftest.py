"""What holds for every test: one intra-op thread, and no deadline for generated examples on a busy machine."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("fedtail", deadline=None)
settings.load_profile("fedtail")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
