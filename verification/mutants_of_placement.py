"""Seeded changes of where experts are placed, and of what is predicted of it."""

from __future__ import annotations

from verification.mutant import Mutant

PLACEMENT = "tests/test_placement.py::"
INSPECT = "tests/test_inspect.py::"
_FOLDER = "src/tokenferry/placement"

OF_PLACEMENT = (
    Mutant(
        "replicas-go-to-the-expert-with-the-most-load-however-many-it-has",
        f"{_FOLDER}/algorithm.py",
        "key=lambda i: (weights[i] / counts[i], -i)",
        "key=lambda i: (weights[i], -i)",
        (f"{PLACEMENT}test_the_published_example",),
    ),
    Mutant(
        "copies-are-packed-lightest-first",
        f"{_FOLDER}/algorithm.py",
        "key=lambda i: (-weights[i], i)",
        "key=lambda i: (weights[i], i)",
        (f"{PLACEMENT}test_the_published_example",),
    ),
    Mutant(
        "groups-are-packed-onto-nodes-as-they-come",
        f"{_FOLDER}/algorithm.py",
        "for groups in pack(group_sums, [num_groups // num_nodes] * num_nodes):",
        "for groups in pack([0.0] * num_groups, [num_groups // num_nodes] * num_nodes):",
        tuple(f"{PLACEMENT}test_four_groups_go_to_two_nodes_in_the_best_way[{seed}]" for seed in range(1, 6)),
    ),
    Mutant(
        "a-rank-takes-the-longer-of-reading-and-multiplying",
        f"{_FOLDER}/step_model.py",
        "expected_slowest(likely, self.weight_bytes / self.memory_bytes_per_s, self._compute_s(placement, rows_LE))",
        "expected_slowest(likely, self.weight_bytes / self.memory_bytes_per_s, 0 * self._compute_s(placement, rows_LE)).maximum("
        "self._compute_s(placement, rows_LE).amax(1))",
        (f"{PLACEMENT}test_predicted_times_by_hand",),
    ),
    Mutant(
        "steps-of-all-kinds-have-the-rows-of-a-mean-step",
        f"{_FOLDER}/verdict.py",
        "scaled = [rows_LE * (kind.rows / mean_rows) for kind in kinds]",
        "scaled = [rows_LE for kind in kinds]",
        (f"{PLACEMENT}test_few_rows_and_many_are_judged_apart",),
    ),
    Mutant(
        "a-layer-counts-once-however-often-it-ran",
        f"{_FOLDER}/verdict.py",
        "model.step_s(placement, rows, shares_L, num_tokens)",
        "model.step_s(placement, rows, None, num_tokens)",
        (f"{PLACEMENT}test_a_layer_that_runs_in_every_second_step",),
    ),
    Mutant(
        "the-slowest-rank-is-the-one-with-the-longest-mean",
        f"{_FOLDER}/chance.py",
        "all_no_later *= torch.where(number < 0, torch.zeros_like(chance), chance)",
        "all_no_later = torch.where(number < 0, torch.zeros_like(chance), chance).minimum(all_no_later)",
        ("tests/test_placement_chance.py::test_the_slowest_of_two_by_hand",),
    ),
    Mutant(
        "each-expert-gets-a-row-by-its-mean-alone",
        f"{_FOLDER}/chance.py",
        "    return 1 - left_out ** max(1.0, num_tokens)",
        "    return rows_LP.clamp(max=1.0)",
        ("tests/test_placement_chance.py::test_chances_by_hand",),
    ),
    Mutant(
        "replayed-steps-have-all-rows-that-came",
        "src/tokenferry/inspection/step_kinds.py",
        "rows = (rows_of_all_steps - sum(known)) / num_others",
        "rows = rows_of_all_steps / num_others",
        (f"{INSPECT}test_replayed_steps_are_a_kind_with_the_rows_that_are_left",),
    ),
    Mutant(
        "float32-that-stands-in-for-16-bits-counts-as-it-is",
        "src/tokenferry/cli/expert_facts.py",
        "(2 if stands_in and tensor.dtype == SUBSTITUTE else 1)",
        "1",
        (f"{INSPECT}test_the_bytes_of_an_expert_are_those_of_its_tensors[float32-for-bfloat16-on-a-cpu]",),
    ),
)
