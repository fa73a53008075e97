"""`python -m fedtail` is the command line; under torchrun every rank runs it, and rank 0 alone reports."""

import os
import sys

from fedtail.cli import main

if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
main()
