"""What the measurement inside vLLM makes of a profile: a layer's parts, and how much of its exchange is a wait."""

import pytest
from benchmarks.vllm_profile import layers_of, split


def launches(layers: int, attention_us: float, experts_us: float, dispatch_us: float, combine_us: float) -> list:
    found, now = [], 0.0
    for _ in range(layers):
        for name, gap_us, us in (
            ("attention", 1.0, attention_us), ("dispatch_kernel", 2.0, dispatch_us), ("experts", 1.0, experts_us),
            ("combine_kernel", 1.0, combine_us),
        ):  # fmt: skip
            found.append((name, now + gap_us, now + gap_us + us))
            now += gap_us + us
    return [*found, ("sampler", now + 5.0, now + 6.0)]


def test_parts_of_a_layer() -> None:
    found = layers_of(launches(6, 10.0, 20.0, 3.0, 4.0), num_layers=3)
    assert len(found) == 4, "the last layers of two forwards are left out"
    assert found[0] == pytest.approx((3.0, 22.0, 4.0, 13.0, 2.0, 1.0))


@pytest.mark.parametrize(
    ("ranks", "wait_us"),
    [
        (((10.0, 20.0), (10.0, 20.0)), 0.0),
        (((10.0, 20.0), (10.0, 15.0)), 0.0),
        (((10.0, 15.0), (5.0, 20.0)), 5.0),
    ],
    ids=["equal", "one-rank-has-more-of-all", "one-of-attention-the-other-of-experts"],
)
def test_a_wait_is_what_ranks_take_in_turn(ranks: tuple, wait_us: float) -> None:
    """The rank that has more of everything would hold a forward up without an exchange too."""
    own = [layers_of(launches(6, *rank, 3.0 + i, 4.0 - i), num_layers=3) for i, rank in enumerate(ranks)]
    found = split(own)
    assert found["wait_us"] == pytest.approx(wait_us)
    assert found["own_us"] == pytest.approx(6.0)
