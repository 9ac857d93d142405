"""What a worker hears of a recovery, and when a later one has begun."""

from __future__ import annotations

from datetime import timedelta

import pytest

from megatron_moetion.job import Notices
from megatron_moetion.recovery.failure import Superseded


def notices() -> Notices:
    return Notices(timedelta(seconds=0.2), lambda calls: None)


def test_a_failure_that_was_told_before_anybody_listened_is_known_afterwards() -> None:
    heard = notices()
    heard.deliver({"op": "freeze", "epoch": 1, "dead": [3]})
    heard.deliver({"op": "facts", "epoch": 1})
    assert heard.wait("facts", 1)["epoch"] == 1
    heard.only_before(1)
    heard.deliver({"op": "freeze", "epoch": 2, "dead": [1, 3]})
    with pytest.raises(Superseded, match="epoch 2 began"):
        heard.only_before(1)
    heard.only_before(2)


def test_what_belongs_to_an_earlier_epoch_is_not_waited_for_any_more() -> None:
    heard = notices()
    heard.deliver({"op": "freeze", "epoch": 2, "dead": [0]})
    with pytest.raises(Superseded):
        heard.wait("facts", 1)
