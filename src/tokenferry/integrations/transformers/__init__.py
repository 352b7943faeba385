"""Mixture-of-experts models of Hugging Face transformers under expert parallelism, every rank with its own requests.

    from tokenferry.integrations.transformers import from_pretrained

    model = from_pretrained("path/to/model", group=group, max_tokens_per_rank=512)
    model.generate(...)               # other prompts, calls and lengths on every rank; or no call at all
    model.expert_parallel.finish()    # takes part in the others' steps until every rank is here

`model.py` loads, `loading.py` reads this rank's experts only and `random_init.py` makes them up, `kernel_experts.py` and
`local_experts.py` run them, `layer.py` puts a MoE layer between its router and its experts, `expert_parallel.py` keeps the steps
of all layers together.
"""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "tokenferry.integrations.transformers needs the package transformers, which the extra `transformers` brings: "
        'pip install ".[transformers]" in a clone of tokenferry',
        name="transformers",
    )

from tokenferry.integrations.transformers.expert_parallel import ExpertParallel
from tokenferry.integrations.transformers.layer import LOCAL_EXPERTS, register
from tokenferry.integrations.transformers.model import from_config, from_pretrained
from tokenferry.integrations.transformers.random_init import random_state

__all__ = ["LOCAL_EXPERTS", "ExpertParallel", "from_config", "from_pretrained", "random_state", "register"]
