"""Named random streams: every random number of a run is a pure function of (seed, stream, key).

Changing how one stream is consumed never changes another, and no stream depends on who else is in a cohort.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a generator is for. The numbers are part of the format of a run: append, never renumber."""

    LONGTAIL = 1
    PARTITION = 2
    LOCAL_TEST = 3
    VALIDATION = 4
    INITIAL = 5  # the model's initial parameters
    COHORT = 6
    BATCHES = 7
    DRAWS = 8  # random tensors of a local step: key (round, phase, client, crc32 of the name), all steps at once
    ALGORITHM = 9  # init_server
    CLIENT = 10  # init_client
    CONSTANTS = 11
    SERVER_DATA = 12
    PROBLEM = 13  # made-up data of tests and examples
    NEWCOMERS = 14
    CLIENT_VALIDATION = 15  # key (client,)
    PROBE = 16  # labelled images of a teacher's head
    SAMPLES = 17  # latents that images are drawn from: key (generator,); their order: no key
    QUALITY = 18  # a judge's own training, subsets of KID
    ROUND = 19  # random tensors that a round's server and clients share: key (round, crc32 of the name)


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """Returns the generator of one stream.

    Args:
        seed: the experiment's seed, >= 0.
        stream: what it is for.
        key: further coordinates, for example (round, client), each >= 0.

    Example:
        >>> int(generator(0, Stream.COHORT, 3).integers(1000)) == int(generator(0, Stream.COHORT, 3).integers(1000))
        True
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(stream), *key)))
