"""Seeded changes of what carries rows of other formats."""

from __future__ import annotations

from verification.mutant import Mutant

COMBINE = "tests/interpreter/test_fp8_combine.py::"
FORMATS = "tests/interpreter/test_formats.py::"
_KERNELS = "src/tokenferry/kernels"
_SYMMETRIC = "src/tokenferry/transports/symmetric"

OF_FORMATS = (
    Mutant(
        "bytes-go-through-slots",
        f"{_SYMMETRIC}/layout.py",
        'dispatch_slot_rows = 0 if dispatch_format.name == "bytes" else slot_rows',
        "dispatch_slot_rows = slot_rows",
        ("tests/test_formats.py::test_gathered_rows_take_the_bytes_of_their_format[bytes-64]",),
    ),
    Mutant(
        "rounds-with-a-bulk-dispatch-alone-do-not-count",
        f"{_SYMMETRIC}/bound_launches.py",
        '"counted_rows": min(layout.slot_rows, layout.dispatch_slot_rows),',
        '"counted_rows": layout.slot_rows,',
        ("tests/interpreter/test_conformance.py::test_recorded_events_of_other_formats_obey_the_rules[bytes]",),
    ),
    Mutant(
        "float8-nan-keeps-its-sign",
        f"{_KERNELS}/fp8_rows.py",
        "return word & ~is_nan",
        "return word",
        (f"{FORMATS}test_named_formats_give_the_bits_of_the_reference[2]",),
    ),
    Mutant(
        "narrow-numbers-are-multiplied-by-a-rounded-reciprocal",
        f"{_KERNELS}/wire_float8.py",
        "return tl.fma(x, below, x * rest)",
        "return x * (below + rest)",
        ("tests/test_float8_division.py::test_every_quotient_of_narrow_numbers_is_the_float8_of_ieee_s[bfloat16-0]",),
    ),
    Mutant(
        "scales-that-are-sent-are-those-of-a-warps-first-block",
        f"{_KERNELS}/fp8_rows.py",
        "tl.gather(scale, tl.arange(0, BLOCK) * 8 % BLOCK, 0)",
        "tl.gather(scale, tl.arange(0, BLOCK) * 8 % BLOCK // 32 * 32, 0)",
        (f"{FORMATS}test_named_formats_give_the_bits_of_the_reference[2]",),
    ),
    Mutant(
        "float8-terms-nan-scale-keeps-its-bits",
        f"{_KERNELS}/fp8_terms.py",
        "return v0, v1, v2, v3, fp8_rows.canonical_scale(n4)",
        "return v0, v1, v2, v3, n4",
        (f"{COMBINE}test_named_cases_give_the_bits_of_the_reference[2]",),
    ),
    Mutant(
        "float8-terms-are-summed-in-another-order",
        f"{_KERNELS}/fp8_terms.py",
        "                source == 0, s0, s1,",
        "                source == size - 1, s0, s1,",
        (f"{COMBINE}test_named_cases_give_the_bits_of_the_reference[3]",),
    ),
    Mutant(
        "float8-terms-that-are-fetched-have-the-scale-of-another-block",
        f"{_KERNELS}/fp8_bulk.py",
        "return tl.gather(word, tl.arange(0, BLOCK) // 8, 0)",
        "return tl.gather(word, tl.arange(0, BLOCK) // 32, 0)",
        (f"{COMBINE}test_slots_and_bulk_in_turn[H272-EP2]",),
    ),
    Mutant(
        "float8-terms-in-place-are-taken-for-others",
        f"{_SYMMETRIC}/rank_kernels.py",
        "return same_rows and partial.scales.data_ptr() == terms.scales.data_ptr()",
        "return True",
        (f"{COMBINE}test_scales_of_other_memory_are_not_taken_for_those_in_place",),
    ),
    Mutant(
        "infinities-become-448",
        f"{_KERNELS}/expert_math.py",
        "return tl.where(largest >= 0x7F800000, nan, bits)",
        "return tl.where(largest > 0x7F800000, nan, bits)",
        (
            "tests/interpreter/test_quantiser_kernels.py::test_scales_rounded_up_to_powers_of_two_have_the_bits_of_the_specification",
        ),
    ),
)
"""Of quantized rows and rows of bytes."""
