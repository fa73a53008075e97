"""What holds for every test: one intra-op thread, and no deadline for generated examples on a busy machine."""

import importlib.util
import signal

import pytest
import torch
from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job; what the tests start would too
    signal.signal(signal.SIGINT, signal.default_int_handler)

if importlib.util.find_spec("flwr") is None:  # doctests are looked for in every module, and this one imports it
    collect_ignore = ["flower_grid.py"]

settings.register_profile("fedtail", deadline=None)
settings.load_profile("fedtail")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
