"""Which experts a token goes to, and with what weight.

One function, `route`, covers the families by its configuration:

    family                        score     choice                          weights
    qwen3_moe, olmoe, mixtral     softmax   topk of scores                  scores, renormalised if the model says so
    gpt_oss                       softmax   topk of logits (linear bias)    softmax of the K chosen logits
    deepseek_v3, glm4_moe,        sigmoid   topk of scores + correction,    scores without the correction,
      nemotron_h                            in the best groups only         renormalised (+1e-20), scaled
    deepseek_v2                   softmax   topk in the best groups only    scores, scaled

Legend of shape suffixes: T this rank's rows, E experts, K chosen experts, G groups, M experts of a group, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from tokenferry.ambient import uncompiled
from tokenferry.config import HIDDEN_DTYPES
from tokenferry.errors import ConfigError, DtypeError, ShapeError, check_kind
from tokenferry.fixed_linear import fixed_linear
from tokenferry.precision import KeepsPrecision

ScoreFunction = Literal["softmax", "sigmoid"]
NOT_LOADED: Final = (None, None, None)
"""Of which device and dtype the kernel for few rows was loaded, and its launch."""
FEW_ROWS: Final = 64
"""Of at most so many rows the router's product is a kernel of our own, if it has at most `FEW_PRODUCTS`."""
FEW_PRODUCTS: Final = 3 << 22
"""T * E * H. Six shapes with E 8 to 256, H 2048 to 7168 and T 1 to 64, one H200, 2026-11-26: the kernel took less time than the
library's product in all 28 cases with fewer, and in two of the eight with more, by 3 and 9 %; in the others up to six times as
much (1xH200-2026-11-26-router-products.jsonl)."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How scores become a choice and weights.

    Attributes:
        hidden_size: H, of the rows that the router sees (the full hidden size, also in a latent layer).
        num_experts: E, of the whole group.
        topk: K.
        score_function: of the logits, in float32.
        topk_before_score: choose K logits, then score only these (gpt_oss). False: score all E, then choose.
        renormalize: divide the K weights by their sum.
        renormalize_epsilon: added to that sum (1e-20 in the deepseek_v3 family, else 0).
        scaling_factor: multiplies the weights last.
        score_correction_bias: the router has one learned number an expert, added to the scores for the choice only.
        num_groups: the experts form this many equal groups of neighbours; 1 for no groups.
        topk_groups: experts are chosen from this many best groups only.
        group_score_topk: a group's score is the sum of its this many best experts (2 in deepseek_v3, 1 in deepseek_v2).
        linear_bias: the router's linear layer has a bias (gpt_oss).
        float32_logits: compute the linear layer in float32 (the deepseek_v3 family does), else in the dtype of `hidden`. On
            CUDA a weight in the 16-bit dtype of `hidden` is fastest: products and sums are float32 without converting either.
        idx_dtype: torch.int32 (what the dispatcher sends) or torch.int64.

    Raises:
        ConfigError: the settings cannot give K experts, or exclude one another.
    """

    hidden_size: int
    num_experts: int
    topk: int
    score_function: ScoreFunction = "softmax"
    topk_before_score: bool = False
    renormalize: bool = False
    renormalize_epsilon: float = 0.0
    scaling_factor: float = 1.0
    score_correction_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score_topk: int = 2
    linear_bias: bool = False
    float32_logits: bool = True
    idx_dtype: torch.dtype = torch.int32

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_experts", "topk", "num_groups", "topk_groups", "group_score_topk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}; give an int")
        if self.topk > self.num_experts:
            raise ConfigError(f"topk is {self.topk} but there are only {self.num_experts} experts; lower topk")
        if self.score_function not in get_args(ScoreFunction):
            raise ConfigError(f"score_function must be softmax or sigmoid, got {self.score_function!r}")
        if self.idx_dtype not in (torch.int32, torch.int64):
            raise ConfigError(f"idx_dtype must be torch.int32 or torch.int64, got {self.idx_dtype!r}")
        if self.topk_before_score and (self.score_correction_bias or self.num_groups > 1):
            raise ConfigError("topk_before_score chooses by logits; a score correction or groups choose by scores: drop one")
        if self.num_groups > 1:
            self._check_groups()

    def _check_groups(self) -> None:
        if self.num_experts % self.num_groups:
            raise ConfigError(f"{self.num_experts} experts do not form {self.num_groups} equal groups; change num_groups")
        group_size = self.num_experts // self.num_groups
        if self.topk_groups > self.num_groups:
            raise ConfigError(f"topk_groups is {self.topk_groups} but there are only {self.num_groups} groups")
        if self.group_score_topk > group_size:
            raise ConfigError(f"group_score_topk is {self.group_score_topk} but a group has only {group_size} experts")
        if self.topk > self.topk_groups * group_size:
            raise ConfigError(
                f"topk is {self.topk} but {self.topk_groups} groups hold only {self.topk_groups * group_size} experts; "
                "raise topk_groups"
            )


def route(
    logits_TE: torch.Tensor, config: RouterConfig, score_correction_bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose K experts a row. Nothing is asked of the host; T = 0 is legal.

    Args:
        logits_TE: [T, E], any floating dtype; the arithmetic is float32.
        config: the rules.
        score_correction_bias_E: [E], needed if and only if `config.score_correction_bias`.

    Returns:
        topk_weights [T, K] float32 and topk_idx [T, K] of `config.idx_dtype`. A row's experts come in descending order of
        what they were chosen by; the order of equal ones is torch.topk's, or on CUDA, where one kernel does it all, by number.
        An expert whose correction is -inf is switched off, and never chosen, nor is one of a group that was not: where fewer than
        K are left, the rest of the row is -1 with weight 0. Logits, NaN and infinite ones too, give K different experts.

    Raises:
        ShapeError: columns other than E.
        DtypeError: no floating dtype.
        ConfigError: a correction without its setting, or the setting without a correction.
    """
    check_kind("logits", logits_TE, torch.Tensor)
    check_kind("config", config, RouterConfig)
    if logits_TE.dim() != 2 or logits_TE.shape[1] != config.num_experts:
        raise ShapeError(f"logits must be [T, {config.num_experts}] (num_experts), got {list(logits_TE.shape)}")
    if not logits_TE.is_floating_point():
        raise DtypeError(f"logits must be of a floating dtype, got {logits_TE.dtype}; convert them with .float()")
    if config.score_correction_bias != (score_correction_bias_E is not None):
        given = "given" if score_correction_bias_E is not None else "missing"
        raise ConfigError(f"score_correction_bias is {config.score_correction_bias} but the tensor is {given}")
    if _has_kernel(logits_TE):
        return _route_by_kernel(logits_TE, config, score_correction_bias_E)
    logits_TE = logits_TE.float()
    if config.topk_before_score:
        chosen_TK, idx_TK = torch.topk(logits_TE, config.topk, dim=-1)
        weights_TK = _score(chosen_TK, config.score_function)
    else:
        scores_TE = _score(logits_TE, config.score_function)
        choice_TE = scores_TE if score_correction_bias_E is None else scores_TE + score_correction_bias_E.float()
        if config.num_groups > 1:
            choice_TE = _keep_best_groups(choice_TE, config)
        chosen_TK, idx_TK = torch.topk(choice_TE, config.topk, dim=-1)
        weights_TK = scores_TE.gather(1, idx_TK)
    is_off_TK = chosen_TK == -math.inf if config.score_correction_bias else None
    if is_off_TK is not None:
        weights_TK, idx_TK = weights_TK.masked_fill(is_off_TK, 0.0), idx_TK.masked_fill(is_off_TK, -1)
    if config.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + config.renormalize_epsilon)
        if is_off_TK is not None:
            weights_TK = weights_TK.masked_fill(is_off_TK, 0.0)  # in a row without any expert the division was 0 / 0
    if config.scaling_factor != 1.0:
        weights_TK = weights_TK * config.scaling_factor
    return weights_TK, idx_TK.to(config.idx_dtype)


def _has_kernel(logits_TE: torch.Tensor) -> bool:
    """The kernel has no gradient; a compiler makes fewer launches of the chain itself."""
    return logits_TE.is_cuda and logits_TE.dtype != torch.float64 and not _wants_operators(logits_TE)


def _wants_operators(tensor: torch.Tensor) -> bool:
    return (tensor.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling()


def _route_by_kernel(
    logits_TE: torch.Tensor, config: RouterConfig, score_correction_bias_E: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from tokenferry.kernels import route as kernel  # here: Triton is not everywhere

    weights_TK, idx_TK = kernel.route(
        logits_TE,
        score_correction_bias_E,
        topk=config.topk,
        num_groups=config.num_groups,
        topk_groups=config.topk_groups,
        group_score_topk=config.group_score_topk,
        is_sigmoid=config.score_function == "sigmoid",
        topk_before_score=config.topk_before_score,
        renormalize=config.renormalize,
        epsilon=config.renormalize_epsilon,
        scale=config.scaling_factor,
        idx_dtype=config.idx_dtype,
    )
    return weights_TK, idx_TK


def _score(logits: torch.Tensor, function: ScoreFunction) -> torch.Tensor:
    return torch.sigmoid(logits) if function == "sigmoid" else torch.softmax(logits, dim=-1)


def _keep_best_groups(choice_TE: torch.Tensor, config: RouterConfig) -> torch.Tensor:
    """Put -inf where an expert's group is not among the best `topk_groups`.

    -inf and not 0: a correction can make every score of a kept group negative, and a 0 from a dropped group would win. Among
    groups of equal score, those of -inf too, the lower number wins, as in the kernel.
    """
    choice_TGM = choice_TE.view(choice_TE.shape[0], config.num_groups, config.num_experts // config.num_groups)
    scores_TG = choice_TGM.topk(config.group_score_topk, dim=-1).values.sum(dim=-1)
    best = scores_TG.sort(dim=-1, descending=True, stable=True).indices[:, : config.topk_groups]
    dropped_TG = torch.ones_like(scores_TG, dtype=torch.bool).scatter_(1, best, False)
    return choice_TGM.masked_fill(dropped_TG.unsqueeze(-1), -math.inf).flatten(1)


def _float32_linear(hidden_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
    """float32 logits. Products of 16-bit numbers are exact in float32, so that CUDA's 16-bit units need no converted copies."""
    is_16_bit = hidden_TH.dtype == weight_EH.dtype and hidden_TH.dtype in (torch.bfloat16, torch.float16)
    if hidden_TH.is_cuda and is_16_bit and not _wants_operators(hidden_TH):
        logits_TE = torch.mm(hidden_TH, weight_EH.t(), out_dtype=torch.float32)
        return logits_TE if bias_E is None else logits_TE + bias_E.float()
    return F.linear(hidden_TH.float(), weight_EH.float(), None if bias_E is None else bias_E.float())


def _is_few_rows(hidden_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None) -> bool:
    """Whether one kernel for few rows makes the logits, which has no gradient, and whose sums are float32."""
    of_one_dtype = hidden_TH.dtype == weight_EH.dtype and (bias_E is None or bias_E.dtype == weight_EH.dtype)
    is_few = hidden_TH.shape[0] <= few_rows(*weight_EH.shape)
    is_served = hidden_TH.is_cuda and is_few and of_one_dtype and weight_EH.dtype in HIDDEN_DTYPES
    return is_served and not any(_wants_operators(tensor) for tensor in (hidden_TH, weight_EH, bias_E) if tensor is not None)


def few_rows(num_experts: int, hidden_size: int) -> int:
    """Up to how many rows a kernel for few rows is the faster one: it reads rows for each expert, and weights for each four rows.

    Example:
        64 for 32 experts and rows of 2880, 48 for 128 and 2048, 6 for 256 and 7168.
    """
    return min(FEW_ROWS, FEW_PRODUCTS // (num_experts * hidden_size))


class Router(KeepsPrecision):
    """The linear layer in front of `route`.

    Parameters: `weight` [E, H]; `bias` [E] with `config.linear_bias`. Buffer: `score_correction_bias` [E] float32 with
    `config.score_correction_bias` (`e_score_correction_bias` in checkpoints of the deepseek_v3 family); it stays float32 when the
    router, or a module around it, is cast.

    Args:
        batch_invariant: a row's bits do not depend on T or on the other rows: the linear layer is `fixed_linear`. A compiler does
            not look inside.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    score_correction_bias: torch.Tensor | None

    def __init__(
        self,
        config: RouterConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.batch_invariant = config, batch_invariant
        self._loaded: tuple[torch.device | None, torch.dtype | None, Any] = NOT_LOADED
        E = config.num_experts
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size, dtype=dtype, device=device), requires_grad=False)
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)
        bias = nn.Parameter(torch.zeros(E, dtype=dtype, device=device), requires_grad=False) if config.linear_bias else None
        self.register_parameter("bias", bias)
        correction = torch.zeros(E, dtype=torch.float32, device=device) if config.score_correction_bias else None
        self.register_buffer("score_correction_bias", correction)

    def kept_dtypes(self) -> Mapping[str, torch.dtype]:
        """See `KeepsPrecision`."""
        return {"score_correction_bias": torch.float32}

    def prepare(self, dtype: torch.dtype) -> None:
        """On CUDA: loads what a call with `hidden` of this dtype launches. Loading waits for the device, so not amid steps."""
        weight: torch.Tensor = self.weight
        if weight.is_cuda:
            dtype = dtype if self.config.float32_logits else weight.dtype
            from tokenferry.kernels.router_linear import load_for  # here: Triton is not everywhere

            if dtype == weight.dtype and dtype in HIDDEN_DTYPES and not self.batch_invariant:
                self._loaded = (weight.device, weight.dtype, load_for(weight, self.bias, self._logits_dtype))
            for num_rows in (1, few_rows(*weight.shape) + 1):
                with torch.no_grad():
                    self(torch.zeros(num_rows, self.config.hidden_size, dtype=dtype, device=weight.device))

    def forward(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route rows.

        Args:
            hidden_TH: [T, H], of the parameters' dtype unless `config.float32_logits`; T may be 0.

        Returns:
            topk_weights [T, K] float32, topk_idx [T, K] of `config.idx_dtype`.

        Raises:
            ShapeError: `hidden` is not [T, H].
            DtypeError: `hidden` has another dtype than the parameters, without `float32_logits`.
        """
        check_kind("hidden", hidden_TH, torch.Tensor)
        if hidden_TH.dim() != 2 or hidden_TH.shape[1] != self.config.hidden_size:
            raise ShapeError(f"hidden must be [T, {self.config.hidden_size}] (the router's), got {list(hidden_TH.shape)}")
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        if not self.config.float32_logits and hidden_TH.dtype != weight.dtype:
            raise DtypeError(f"hidden is {hidden_TH.dtype} but the router's weight is {weight.dtype}; convert one of them")
        if self.batch_invariant:
            alike: tuple[torch.Tensor, torch.Tensor] = self._route_alike(hidden_TH)
            return alike
        if _is_few_rows(hidden_TH, weight, bias):
            logits_TE = self._few_rows_linear(hidden_TH)
        elif self.config.float32_logits:
            logits_TE = _float32_linear(hidden_TH, weight, bias)
        else:
            logits_TE = F.linear(hidden_TH, weight, bias)
        return route(logits_TE, self.config, self.score_correction_bias)

    @property
    def _logits_dtype(self) -> torch.dtype:
        return torch.float32 if self.config.float32_logits else self.weight.dtype

    def _few_rows_linear(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        from tokenferry.kernels.router_linear import router_linear  # here: Triton is not everywhere

        weight: torch.Tensor = self.weight
        device, dtype, launch = self._loaded
        if (device, dtype) != (weight.device, weight.dtype):  # not prepared, or moved since
            launch = None
        logits_TE: torch.Tensor = router_linear(hidden_TH, weight, self.bias, self._logits_dtype, launch)
        return logits_TE

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is pickled, has no loaded kernel."""
        return {**self.__dict__, "_loaded": NOT_LOADED}

    @uncompiled
    @torch.no_grad()
    def _route_alike(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The choice is made for each row alone, so that its logits are all that could differ."""
        weight: torch.Tensor = self.weight
        if self.config.float32_logits:
            if hidden_TH.dtype != weight.dtype:
                hidden_TH, weight = hidden_TH.float(), weight.float()
            logits_TE = fixed_linear(hidden_TH, weight, self.bias, out_dtype=torch.float32)
        else:
            logits_TE = fixed_linear(hidden_TH, weight, self.bias)
        return route(logits_TE, self.config, self.score_correction_bias)

    def extra_repr(self) -> str:
        return repr(self.config)
