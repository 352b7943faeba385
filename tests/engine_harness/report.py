"""What the engines of tests/gpu/test_megatron_engine.py gave, a line for each engine, variant and load, and the verdict on uneven
ranks:  python -m engine_harness.report FOLDER  with the folder that pytest made for them (--basetemp).
"""

import pickle
import sys
from pathlib import Path

from engine_harness.cases import Run


def lines(run: Run) -> list[str]:
    """Requests with other tokens than Megatron's own dispatcher gives on the same engine, else on the first."""
    names = list(run.ranks[0])
    reference = next(name for name in names if name[1] == "megatron")
    text = []
    for case, variant in names:
        wanted = (case, "megatron") if (case, "megatron") in names else reference
        for load in run.ranks[0][case, variant]:
            if (case, variant) == wanted or load not in run.ranks[0][wanted]:
                continue
            requests = sum(len(outcome.tokens) for outcome in run.outcomes(*wanted, load))
            parted = run.differences(case, variant, load, wanted)
            share = run.share_of_other_choices(case, variant, load, wanted)
            text.append(f"{case:24} {variant:13} {load:15} {len(parted):3} of {requests} part; other choices {share:.4f}")
    return text


def verdict(run: Run) -> str:
    """Whether uneven ranks' tokens are Megatron's once all ranks take graphs of one size."""
    own: dict[str, int] = {}
    forced: dict[str, int] = {}
    for case, equal in (("block-graphs", "equal-graphs"), ("large", "large-equal-graphs")):
        for load in run.ranks[0].get((equal, "nvls"), ()):
            for found, name in ((own, case), (forced, equal)):
                parted = run.differences(name, "nvls", load, (case, "megatron"))
                found |= {f"{load}, {request}": place for request, place in parted.items()}
    cause = "equal graphs part them: it is us" if forced else "none part, so that nothing shows the cause"
    if own:
        cause = "equal graphs do not help: it is us" if forced else "the graphs' sizes part them"
    return f"uneven ranks in graphs: {len(own)} requests part with own graphs, {len(forced)} with equal graphs: {cause}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run = Run([pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(2)], "")
    print(*lines(run), verdict(run), sep="\n")
