"""The driver gets what Triton's launcher would give it: every argument in its place, whatever changes between calls."""

import ctypes
import itertools
import types
from collections.abc import Callable

import pytest

from tokenferry.kernels import driver_launch
from tokenferry.kernels.driver_launch import Attribute, Config, DriverKernel, LaunchShape

TYPES = {
    "buffer_ptr": "i64", "rank": "i32", "size": "i32", "rows": "*bf16", "num_rows": "i32", "scale": "fp32", "layer": "i32",
}  # fmt: skip
FIXED = {"buffer_ptr": 1 << 40, "rank": 3, "size": 4}
READ = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "*bf16": ctypes.c_uint64, "fp32": ctypes.c_float}
FUNCTION, STREAM = 0x1234, 0x77
LaunchKernel = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


def driver(seen: list[dict[str, object]], answer: int) -> Callable[..., int]:
    """Stands for `cuLaunchKernelEx`: writes down what it was given."""

    def launch(config_at: int, function: int, parameters_at: int, extra: int | None) -> int:
        config = Config.from_address(config_at)
        addresses = (ctypes.c_void_p * (len(TYPES) + 2)).from_address(parameters_at)
        values = {name: READ[kind].from_address(addresses[n]).value for n, (name, kind) in enumerate(TYPES.items())}
        scratch = [ctypes.c_int64.from_address(addresses[len(TYPES) + n]).value for n in range(2)]
        attribute = Attribute.from_address(config.attributes)
        shape = (config.grid_x, config.grid_y, config.grid_z, config.block_x, config.block_y, config.block_z)
        seen.append(
            {
                **values,
                "scratch": scratch,
                "shape": shape,
                "shared": config.shared_bytes,
                "stream": config.stream,
                "attribute": (attribute.number, attribute.value, config.num_attributes),
                "function": function,
                "extra": extra,
            }
        )
        return answer

    return LaunchKernel(launch)


VARYING = ("rows", "num_rows", "scale", "layer")


def bound(
    varying: tuple[str, ...] = VARYING, *, grid: int | None = 5, answer: int = 0
) -> tuple[Callable[..., None], list[dict[str, object]], list[tuple[float, ...]]]:
    """A bound launch, what its driver was given, and what went to Triton's launcher."""
    seen: list[dict[str, object]] = []
    refused: list[tuple[float, ...]] = []
    kernel = DriverKernel(
        driver=driver(seen, answer),
        function=FUNCTION,
        shape=LaunchShape(num_threads=128, shared_bytes=64, pdl=True, num_hidden=2),
        types=TYPES,
        current_stream=lambda: STREAM,
    )
    launch = driver_launch.bind(kernel, grid, FIXED, varying, lambda *args: refused.append(args))
    return launch, seen, refused


def test_fixed_and_varying_arguments_reach_the_driver() -> None:
    launch, seen, _ = bound()
    launch(1 << 45, 7, 0.5, -1)
    launch((1 << 45) + 16, 0, 2, 2)
    for told, values in zip(seen, ((1 << 45, 7, 0.5, -1), ((1 << 45) + 16, 0, 2.0, 2)), strict=True):
        assert {name: told[name] for name in TYPES} == {**FIXED, **dict(zip(VARYING, values, strict=True))}
        assert told["scratch"] == [0, 0]
        assert told["shape"] == (5, 1, 1, 128, 1, 1)
        assert (told["shared"], told["stream"], told["function"], told["extra"]) == (64, STREAM, FUNCTION, None)
        assert told["attribute"] == (6, 1, 1)


@pytest.mark.parametrize("varying", list(itertools.permutations(VARYING)), ids="-".join)
def test_varying_arguments_are_given_in_the_order_of_bind(varying: tuple[str, ...]) -> None:
    values = {"rows": 1 << 45, "num_rows": 7, "scale": 0.5, "layer": -1}
    launch, seen, _ = bound(varying)
    launch(*(values[name] for name in varying))
    assert {name: seen[0][name] for name in values} == values


def test_without_a_grid_it_is_given_first() -> None:
    launch, seen, refused = bound(grid=None, answer=1)
    launch(9, 16, 1, 0.5, 2)
    assert seen[0]["shape"] == (9, 1, 1, 128, 1, 1)
    assert refused == [(9, 16, 1, 0.5, 2)]


def test_a_launch_that_the_driver_refuses_goes_to_tritons_launcher() -> None:
    launch, _, refused = bound(answer=201)  # CUDA_ERROR_INVALID_CONTEXT: a thread's first call
    launch(16, 1, 0.5, 2)
    assert refused == [(16, 1, 0.5, 2)]


def test_a_forgotten_argument_is_an_error() -> None:
    launch, seen, _ = bound()
    with pytest.raises(Exception, match="expected"):
        launch(16, 1, 0.5)
    assert seen == []


def test_structures_are_as_cuda_h_has_them() -> None:
    assert (ctypes.sizeof(Config), Config.stream.offset, Config.attributes.offset, Config.num_attributes.offset) == (
        56,
        32,
        40,
        48,
    )
    assert (ctypes.sizeof(Attribute), Attribute.value.offset) == (72, 8)


PTX = """
.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2,
	.param .u64 .ptr .global .align 1 kernel_param_3
)
.reqntid 128
{
	ld.param.b64 %rd1, [kernel_param_0];
}
"""


def compiled(ptx: str = PTX, **changes: object) -> types.SimpleNamespace:
    usual = {"num_ctas": 1, "num_warps": 4, "warp_size": 32, "shared": 0, "launch_pdl": False, "global_scratch_size": 0}
    metadata = {**usual, **changes}
    return types.SimpleNamespace(metadata=types.SimpleNamespace(**metadata), asm={"ptx": ptx})


def test_parameters_are_read_from_the_code() -> None:
    assert driver_launch.parameter_widths(PTX) == [64, 32, 64, 64]
    shape = driver_launch.launch_shape(compiled(), {"a": "i64", "b": "i32"})
    assert shape == LaunchShape(num_threads=128, shared_bytes=0, pdl=False, num_hidden=2)


@pytest.mark.parametrize(
    ("kernel", "types_"),
    [
        (compiled(), {"a": "i64", "b": "i64"}),
        (compiled(), {"a": "i64"}),
        (compiled(""), {"a": "i64", "b": "i32"}),
        (compiled(global_scratch_size=16), {"a": "i64", "b": "i32"}),
        (compiled(num_ctas=2), {"a": "i64", "b": "i32"}),
    ],
    ids=["other-width", "other-number", "no-code", "scratch-memory", "clusters"],
)
def test_what_is_not_known_is_left_to_triton(kernel: types.SimpleNamespace, types_: dict[str, str]) -> None:
    assert driver_launch.launch_shape(kernel, types_) is None


def test_our_own_kernels_are_known() -> None:
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget

    from tokenferry.kernels import counts, wire
    from tokenferry.kernels.launch import options, source

    if wire.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    kernel = triton.compile(
        source(counts.counts_kernel, counts.SIGNATURE, {"LANES": 32, "TELEMETRY": 0, "PDL": 1}),
        target=GPUTarget("cuda", 90, 32),
        options=options(1, True),
    )
    arguments = {name: kind for name, kind in counts.SIGNATURE.items() if kind != "constexpr"}
    shape = driver_launch.launch_shape(kernel, arguments)
    assert shape is not None and (shape.num_threads, shape.pdl) == (32, True)
