"""MXFP4 weights: numbers of 4 bits (E2M1), 32 of a row share a power of two (E8M0). They stay packed: 4.25 bits a weight.

E2M1 is a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. A weight times its
power of two is exact in bfloat16, so a product of packed weights has the bits of the same product of unpacked ones.

Legend of shape suffixes: L experts, Y rows and X columns of a matrix, G groups of 32 columns, U blocks of 64 rows, V blocks of 64
columns, W words of a block.
"""

from __future__ import annotations

import torch

from tokenferry.errors import DtypeError, ShapeError, check_kind

GROUP = 32
"""Columns that share a scale."""
BLOCK = 64
"""Rows and columns of what is packed together."""
WORDS = BLOCK * BLOCK // 8
SCALE_WORDS = BLOCK * (BLOCK // GROUP) // 4
MAX_SCALE = 128
"""Largest scale byte that `pack` takes: 2. It makes 2 ** 127 of it, the largest power of two of bfloat16. Those of trained models
are far smaller."""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_ALL, _LAST_SIGN, _LAST_EXPONENT, _LAST_MANTISSA = 0x81C081C0, 0x80008000, 0x01800180, 0x00400040


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The matrices of a checkpoint in bfloat16: the specification that everything else here is compared with.

    Args:
        blocks: [..., G, 16] uint8; the lower half of a byte is the earlier column.
        scales: [..., G] uint8: a group is multiplied by 2 ** (scale - 127). 255 stands for NaN.

    Returns:
        [..., 32·G] bfloat16.

    Example:
        A byte 0x92 with scale 128: its columns are 1.0 and -0.5, times 2: 2.0 and -1.0.
    """
    magnitudes = torch.tensor(MAGNITUDES, dtype=torch.float32, device=blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).to(torch.int32)
    values = magnitudes[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    powers = torch.exp2(scales.to(torch.float64) - 127).to(torch.float32).masked_fill(scales == 255, torch.nan)
    return (values * powers.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)


def check_checkpoint(name: str, blocks: torch.Tensor, scales: torch.Tensor) -> None:
    """Raises where blocks and scales are not those of [L, Y, X] matrices."""
    check_kind(f"{name}_blocks", blocks, torch.Tensor)
    check_kind(f"{name}_scales", scales, torch.Tensor)
    for kind, tensor in (("blocks", blocks), ("scales", scales)):
        if tensor.dtype != torch.uint8:
            raise DtypeError(f"{name}_{kind} must be uint8, as checkpoints of MXFP4 have them, got {tensor.dtype}")
    if blocks.dim() != 4 or blocks.shape[3] != GROUP // 2 or blocks.shape[:3] != scales.shape:
        raise ShapeError(
            f"{name}_blocks must be [experts, rows, groups, 16] and {name}_scales [experts, rows, groups], "
            f"got {list(blocks.shape)} and {list(scales.shape)}"
        )
    if scales.numel() and int(scales.max()) > MAX_SCALE:
        raise ShapeError(
            f"{name}_scales has a scale byte of {int(scales.max())}, but packed weights go up to {MAX_SCALE} (a power of 2); "
            "load what tokenferry.experts.mxfp4.dequantize makes of them"
        )


def pack(blocks: torch.Tensor, scales: torch.Tensor, *, gated: bool, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rearranges a checkpoint's matrices as the kernel reads them: each thread's weights lie side by side.

    A block is 64 rows and 64 columns. A thread multiplies with 4 words of 16 bytes of it, each of 8 weights of one row and their
    scale. The rows of a block are those that tensor cores take, in this order: 4 warps, 2 (rows 8 apart, or with a gate a gate
    and its up, which so meet in one thread), 8 threads. The columns of a word are 2·t, 2·t + 1, and the same 8, 16 and 24 columns
    further on, where t is one of 4 threads.

    The bits of a weight are put into a bfloat16 as they are: the sign, then six zeros, then exponent and mantissa, zeros.
    That is the weight times 2 ** -126, which the scale makes good, and it holds for 0.5 too. Two weights are a word of which 8
    bits (0x81C081C0) count. In a stored word those of the first two weights are in place, those of the next two lie 3 bits
    lower and of the next 6 bits lower; the last two's are put into the bits that are left, so that one XOR of two shifts and one
    further shift bring them out. From the four bits of a weight as checkpoints have them it would take half as many
    instructions again, and they are what the time goes into.

    Args:
        blocks, scales: [L, Y, G, 16] and [L, Y, G], checked. Y is even with a gate.
        gated, interleaved: whether rows are gates and ups, and whether these take turns; else gates come first.

    Returns:
        [L, U, V, 512] int32 words and [L, U, V, 32] int32, each four scale bytes. Rows and columns are padded with zeros.
    """
    made = [_pack_matrix(*matrix, gated, interleaved) for matrix in zip(blocks, scales, strict=True)]
    words, factors = zip(*made, strict=True)
    return torch.stack(words), torch.stack(factors)


def unpack(
    words_UVW: torch.Tensor, factors_UVW: torch.Tensor, num_rows: int, num_columns: int, *, gated: bool, interleaved: bool
) -> torch.Tensor:
    """One matrix of `pack` in bfloat16, [num_rows, num_columns], as it lay before."""
    word = words_UVW.to(torch.int64) & 0xFFFFFFFF
    last = ((word << 1 ^ word >> 3) & (_LAST_SIGN | _LAST_EXPONENT)) | (word >> 7 & _LAST_MANTISSA)
    pairs = torch.stack((word & _ALL, word << 3 & _ALL, word << 6 & _ALL, last), -1)
    halves = torch.stack((pairs & 0xFFFF, pairs >> 16), -1).flatten(-2)
    values = (halves << 16).to(torch.int32).view(torch.float32)  # int64 to int32 keeps the lower half
    factor = (factors_UVW.unsqueeze(-1) >> torch.arange(0, 32, 8, dtype=torch.int32, device=word.device)) & 0xFF
    factor = (factor << 23).view(torch.float32)  # [U, V, (warp, n), (g, r)]
    U, V = words_UVW.shape[:2]
    values = values.view(U, V, 4, 8, 4, 2, 2, 2, 2, 2) * factor.view(U, V, 4, 8, 1, 2, 2, 1, 1, 1)
    # u, warp, r, n | v, g, h, k8, t, b
    matrix = values.permute(0, 2, 6, 3, 1, 5, 7, 8, 4, 9).reshape(U, 4, 2, 8, V * BLOCK)
    if not gated:
        matrix = matrix.reshape(U * BLOCK, V * BLOCK)
    elif interleaved:
        matrix = matrix.transpose(2, 3).reshape(U * BLOCK, V * BLOCK)
    else:
        matrix = matrix.permute(2, 0, 1, 3, 4).reshape(2, U * BLOCK // 2, V * BLOCK)[:, : num_rows // 2].flatten(0, 1)
    return matrix[:num_rows, :num_columns].to(torch.bfloat16)


def _pack_matrix(
    blocks_YGB: torch.Tensor, scales_YG: torch.Tensor, gated: bool, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.stack((blocks_YGB & 15, blocks_YGB >> 4), -1).flatten(1).to(torch.int64)
    codes, factors = _by_block(codes, BLOCK, gated, interleaved), _by_block(scales_YG + 126, BLOCK // GROUP, gated, interleaved)
    U, V = codes.shape[0], codes.shape[4]
    # u, warp, r, n, v, (g, h, k8, t, b) -> u, v, warp, n, t, g, r, (h, k8), b
    codes = codes.view(U, 4, 2, 8, V, 2, 2, 2, 4, 2).permute(0, 4, 1, 3, 8, 5, 2, 6, 7, 9).flatten(-3, -2)
    halves = (codes & 8) << 12 | (codes & 7) << 6
    pairs = halves[..., 0] | halves[..., 1] << 16
    word = pairs[..., 0] | pairs[..., 1] >> 3 | pairs[..., 2] >> 6
    wanted = pairs[..., 3] ^ (word << 1 ^ word >> 3)
    word |= (wanted & _LAST_SIGN) >> 1 | (wanted & _LAST_EXPONENT) << 3 | (pairs[..., 3] & _LAST_MANTISSA) << 7
    factors = factors.view(U, 4, 2, 8, V, 2).permute(0, 4, 1, 3, 5, 2).contiguous()
    return word.to(torch.int32).flatten(2), factors.view(U, V, -1).view(torch.int32)


def _by_block(matrix_YX: torch.Tensor, columns: int, gated: bool, interleaved: bool) -> torch.Tensor:
    """[U, 4, 2, 8, V, columns]: rows in the order of `pack`, padded with zeros."""
    Y, X = matrix_YX.shape
    halves = matrix_YX.view(1, Y, X)
    if gated:
        halves = matrix_YX.view(Y // 2, 2, X).transpose(0, 1) if interleaved else matrix_YX.view(2, Y // 2, X)
    size = BLOCK // len(halves)
    padded = torch.nn.functional.pad(halves, (0, -X % columns, 0, -halves.shape[1] % size))
    U, V = padded.shape[1] // size, padded.shape[2] // columns
    if gated:
        return padded.view(2, U, 4, 8, V, columns).permute(1, 2, 0, 3, 4, 5)
    return padded.view(U, 4, 2, 8, V, columns)
