"""`python -m fedtail` is the command line; under torchrun every rank runs it, and rank 0 alone reports."""

import os
import sys

from fedtail.cli import main

if "TORCHELASTIC_RUN_ID" in os.environ:  # else torch is not wanted yet
    from fedtail.engines.distributed import rank

    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
main()
