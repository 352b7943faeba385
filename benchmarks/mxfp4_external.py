"""The two grouped products of the Triton project (`python/triton_kernels` of its repository, as of Triton 3.5.1), on MXFP4.

They are no part of this project: a folder that holds the package is named to `benchmarks/mxfp4.py`. The package of that name on
PyPI is another project's.
"""

import importlib
import sys

import torch

NUM_WARPS = 8


class ExternalProducts:
    """Layers of one rank's experts, laid out as that project's Hopper kernels take them.

    Args:
        folder: where the package lies.
        checkpoints: of each layer, up_blocks, up_scales, down_blocks, down_scales.
    """

    def __init__(self, folder, checkpoints, up_bias, down_bias, activation):
        sys.path.insert(0, str(folder))
        self.matmul = importlib.import_module("triton_kernels.matmul_ogs")
        self.routing = importlib.import_module("triton_kernels.routing")
        self._tensor = importlib.import_module("triton_kernels.tensor")
        self._layout = importlib.import_module("triton_kernels.tensor_details.layout")
        # As vLLM sets it for Hopper.
        importlib.import_module("triton_kernels.matmul_ogs_details.opt_flags").update_opt_flags_constraints({"split_k": 1})
        swiglu = importlib.import_module("triton_kernels.swiglu").swiglu_fn
        function = self.matmul.FnSpecs("swiglu", swiglu, ("alpha", "limit"))
        self.activation = self.matmul.FusedActivation(function, (activation.alpha, activation.limit), 2)
        self.biases = up_bias.float(), down_bias.float()
        self.layers = [(*self._matrices(*parts[:2]), *self._matrices(*parts[2:])) for parts in checkpoints]

    def _matrices(self, blocks, scales):
        scales = torch.nn.functional.pad(scales, (0, -scales.shape[-1] % 4))
        layout, settings = self._layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        of_scales, more = self._layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=NUM_WARPS)
        values = self._tensor.wrap_torch_tensor(blocks.flatten(-2).transpose(-2, -1), dtype=self._tensor.FP4)
        weights = self._tensor.convert_layout(values, layout, **settings)
        scale = self._tensor.convert_layout(self._tensor.wrap_torch_tensor(scales.transpose(-2, -1)), of_scales, **more)
        return weights, self.matmul.PrecisionConfig(weight_scale=scale, out_dtype=torch.bfloat16)

    def routing_of(self, counts_L, num_pairs):
        """Of rows that lie sorted by expert already, so that neither gathering nor a sum is counted."""
        data = self.routing.compute_expt_data_torch(counts_L, len(counts_L), num_pairs)
        return self.routing.RoutingData(None, counts_L, len(counts_L), 1, data)

    def run(self, layer, rows, routing):
        """Both products: activated rows, and outputs, in the order of `rows`."""
        up, up_config, down, down_config = self.layers[layer]
        first = self.matmul.matmul_ogs(
            rows, up, self.biases[0], routing, precision_config=up_config, fused_activation=self.activation
        )
        return first, self.matmul.matmul_ogs(first, down, self.biases[1], routing, precision_config=down_config)
