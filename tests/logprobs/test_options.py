"""Options survive the string in which they go through an operator's schema."""

import pytest

from powerflow_fast.logprobs.options import HeadOptions, check_door_options

OPTIONS = [
    HeadOptions(),
    HeadOptions(temperature=0.1 + 0.2, logit_scale=-1e-40, softcap=30.0, ignore_index=-1),
    HeadOptions(entropy=True, detach_entropy=True, round_logits=True, backend="triton"),
    HeadOptions(grad_tolerance=1e-3, group_name="0x1 'of' ranks", route="sparse"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_what_is_decoded_is_what_was_encoded(options):
    assert HeadOptions.decode(options.encode()) == options
    assert HeadOptions.decode(options.encode()) is HeadOptions.decode(options.encode())


def test_what_the_route_says():
    assert HeadOptions(route="sparse").wants_unit_gradient
    assert not HeadOptions(route="cache").wants_unit_gradient
    assert HeadOptions().reads_entropy_only
    assert not HeadOptions(entropy=True).reads_entropy_only
    assert HeadOptions(entropy=True, detach_entropy=True).reads_entropy_only


def test_doors_take_their_three_options_alone():
    check_door_options({"backend": "torch", "grad_tolerance": 1e-3, "round_logits": True})
    with pytest.raises(ValueError, match="temperature: no such option of the head"):
        check_door_options({"temperature": 0.5})
    with pytest.raises(ValueError, match="grad_tolerance: expected a probability mass"):
        check_door_options({"grad_tolerance": 1.0})
