"""Random cases of dispatch and combine. Apart from `cases`, which every rank process imports: hypothesis takes half a second."""

import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st

from cases import DTYPES, Case, StepCase


@st.composite
def scenarios(draw: st.DrawFn, capacity: int = 9) -> tuple[int, Case]:
    world_size = draw(st.integers(1, 5))
    num_experts = draw(st.integers(world_size, 3 * world_size + 1))

    def step() -> StepCase:
        tokens = tuple(draw(st.lists(st.integers(0, capacity), min_size=world_size, max_size=world_size)))
        below = st.tuples(*(st.integers(0, count) for count in tokens))
        return StepCase(
            tokens=tokens,
            real=draw(st.none() | below),
            supplied=draw(st.none() | below),
            real_as_tensor=draw(st.booleans()),
            routing=draw(st.sampled_from(["uniform", "skewed", "none", "repeated"])),
            payload=draw(st.sampled_from(["normal", "hostile"])),
            index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
            weight_dtype=draw(st.sampled_from(DTYPES)),
            partial_dtype=draw(st.none() | st.sampled_from(DTYPES)),
            layers=draw(st.integers(1, 2)),
            halves=draw(st.booleans()),
            own_buffer=draw(st.booleans()),
            spare=draw(st.none() | st.integers(0, 2)),
            into_out=draw(st.booleans()),
            quantized=draw(st.booleans()),
            quantized_terms=draw(st.booleans()),
            seed=draw(st.integers(0, 1000)),
        )

    hidden_size = draw(st.sampled_from([1, 2, 7, 16, 40, 144]))
    formats = ["same", "same", "bytes", *["fp8_block128"] * 2 * (hidden_size % 16 == 0)]
    case = Case(
        hidden_size=hidden_size,
        dispatch_format=draw(st.sampled_from(formats)),
        num_experts=num_experts,
        topk=draw(st.integers(1, min(4, num_experts))),
        dtype=draw(st.sampled_from(DTYPES)),
        combine_dtype=draw(st.none() | st.sampled_from((*DTYPES, *[torch.float8_e4m3fn] * (hidden_size % 16 == 0)))),
        capacity=capacity,
        steps=tuple(step() for _ in range(draw(st.integers(1, 4)))),
    )
    return world_size, case


PROPERTY = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
