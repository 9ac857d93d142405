"""The device's generator is the CPU's."""

import torch

from megatron_moetion.rehearsal import devices, rng


def test_saving_and_restoring_the_devices_state_repeats_cpu_draws(apart):
    def body():
        rng.install()
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(3)
        torch.cuda.random.set_rng_state(state)
        assert torch.equal(torch.rand(3), drawn)
        torch.cuda.default_generators[5].set_state(state)
        assert torch.equal(torch.rand(3), drawn)

    apart(body)


def test_a_seed_for_both_is_one_seed(apart):
    def body():
        devices.install()
        rng.install()
        torch.manual_seed(3)
        drawn = torch.rand(3)
        torch.cuda.manual_seed_all(3)
        assert torch.equal(torch.rand(3), drawn)

    apart(body)
