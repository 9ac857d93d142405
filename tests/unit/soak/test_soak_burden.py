"""What a calm run has to bear with: decided by the seed, and below what counts as a hang."""

from itertools import islice

import pytest

from megatron_moetion.agent.hangs import SHORTEST_OF_TIMEOUT
from megatron_moetion.config import Config
from tests.soak.burden import bursts, delay

SHORTEST_LIMIT = Config().timeout / SHORTEST_OF_TIMEOUT
SAMPLES_OF_ITERATION, SAMPLES_OF_EVALUATION = 8, 16


def test_the_same_seed_gives_the_same_load_and_another_one_another() -> None:
    first, again, other = (list(islice(bursts(seed, 2), 20)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert all(2 <= burst.processes <= 6 for burst in first)


@pytest.mark.parametrize("seed", range(5))
def test_iterations_are_slow_but_no_hang_and_some_evaluations_take_longer(seed: int) -> None:
    seconds = [delay(seed, index, validation=False) for index in range(16000)]
    count = SAMPLES_OF_ITERATION
    iterations = [sum(seconds[i : i + count]) for i in range(0, len(seconds), count)]
    assert 4 < max(iterations) < SHORTEST_LIMIT.total_seconds()
    late = [delay(seed, index, validation=True) for index in range(2000)]
    count = SAMPLES_OF_EVALUATION
    evaluations = [sum(late[i : i + count]) for i in range(0, len(late), count)]
    assert max(evaluations) > SHORTEST_LIMIT.total_seconds()
