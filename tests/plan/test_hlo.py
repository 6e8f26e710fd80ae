"""Counting FLOPs, bytes and collectives: closed forms, and the same counted another way."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsg_jax.plan.convolution import convolution_flops
from lsg_jax.plan.hlo import analyse
from lsg_jax.plan.traced import traced_flops

N = 8


def matrix(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def walk(x, steps):
    return jax.lax.fori_loop(0, steps, lambda _, x: x @ x, x)


def scanned(x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.stack([x] * 5))[0]


def nested(x):
    once = lambda x, _: (jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ x), x), None)
    return jax.lax.scan(once, x, jnp.arange(4))[0] @ x


def backward(x):
    return jax.grad(lambda x: scanned(x).sum())(x)


def strided(x):
    kernel = jnp.ones((3, 2, 4, 6))  # H W I O
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 1), ((1, 1), (0, 1)), rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def grouped(x):
    return jax.lax.conv_general_dilated(
        x, jnp.ones((2, 2, 2, 4)), (2, 2), "VALID", feature_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


SQUARE = 2 * N**3
CASES = {  # function, arguments, FLOPs, trips of loops of unknown length
    "product": (lambda x, y: x @ y, (matrix(3, N), matrix(N, 5)), 2 * 3 * N * 5, {}),
    "batched": (
        lambda x, y: jnp.einsum("btnh,bsnh->bnts", x, y),
        (matrix(2, 3, 4, N), matrix(2, 5, 4, N)),
        2 * 240 * N // 2,
        {},
    ),
    "scan": (scanned, (matrix(N, N),), 5 * SQUARE, {}),
    "nested loops": (nested, (matrix(N, N),), 13 * SQUARE, {}),
    "backward scan": (backward, (matrix(N, N),), 15 * SQUARE, {}),
    "loop of unknown length": (walk, (matrix(N, N), jax.ShapeDtypeStruct((), jnp.int32)), 7 * SQUARE, {"walk": 7}),
    "a mean": (walk, (matrix(N, N), jax.ShapeDtypeStruct((), jnp.int32)), 2.5 * SQUARE, {"walk": 2.5, "outer": 3}),
    # H: outputs 0..3 meet rows -1..1, 1..3, 3..5, 5..7 of 7: 2 + 3 + 3 + 2; W: 5 outputs, columns o and o + 2 of 6: 5 + 4
    "strided, padded, dilated": (strided, (matrix(2, 7, 6, 4),), 2 * 2 * 4 * 6 * 10 * 9, {}),
    "patches in groups": (grouped, (matrix(2, 6, 6, 4),), 2 * 2 * 2 * 4 * 3 * 3 * 4, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_flops_of_trace_and_of_compiled_program(name):
    function, arguments, expected, trips = CASES[name]
    assert traced_flops(function, *arguments, trips=trips) == expected
    assert analyse(jax.jit(function).lower(*arguments).compile().as_text(), trips=trips).flops == expected


def test_a_loop_of_unknown_length_is_refused():
    arguments = matrix(N, N), jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.raises(ValueError, match="unknown length"):
        traced_flops(walk, *arguments)
    with pytest.raises(ValueError, match="walk: state how often"):
        analyse(jax.jit(walk).lower(*arguments).compile().as_text())


def test_what_nobody_uses_is_not_counted():
    assert traced_flops(lambda x: (x @ x, x)[1], matrix(N, N)) == 0


def test_taps_of_a_convolution_one_by_one():
    rng = np.random.default_rng(0)
    for _ in range(60):
        inputs, size, stride, base, dilation = (int(rng.integers(1, high)) for high in (9, 5, 4, 4, 4))
        pad = int(rng.integers(0, 4))
        spread = (inputs - 1) * base + 1 + 2 * pad
        outputs = (spread - ((size - 1) * dilation + 1)) // stride + 1
        if outputs < 1:
            continue
        there = {pad + i * base for i in range(inputs)}
        met = sum(o * stride + t * dilation in there for o, t in itertools.product(range(outputs), range(size)))
        axis = (inputs, outputs, size, stride, pad, base, dilation)
        assert convolution_flops(rows=3, features=2, out_features=5, axes=[axis]) == 2 * 3 * 2 * 5 * met


TPU_MODULE = """HloModule jit_step, is_scheduled=true, num_partitions=8

%fused_slice (param_0.1: bf16[10,64], param_1.1: s32[]) -> bf16[1,64] {
  %param_0.1 = bf16[10,64]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)S(6)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %slice.1 = bf16[1,64]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%param_0.1, %param_1.1, %zero.1), dynamic_slice_sizes={1,64}
}

%start (param_0.2: bf16[1,64]) -> (bf16[1,64], bf16[8,64], u32[]) {
  %param_0.2 = bf16[1,64]{1,0} parameter(0)
  %gather.2 = bf16[8,64]{1,0} all-gather(%param_0.2), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}
  ROOT %begun.2 = (bf16[1,64]{1,0}, bf16[8,64]{1,0}, u32[]) custom-call(%gather.2), custom_call_target="AsyncCollectiveStart"
}

%along (param_0.3: bf16[1,64], param_1.3: bf16[16,16]) -> bf16[16,16] {
  %param_0.3 = bf16[1,64]{1,0} parameter(0)
  %param_1.3 = bf16[16,16]{1,0:S(1)} parameter(1)
  %gather.3 = bf16[8,64]{1,0} all-gather(%param_0.3), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}
  ROOT %product.3 = bf16[16,16]{1,0:S(1)} convolution(%param_1.3, %param_1.3), dim_labels=bf_io->bf
}

%all-reduce-scatter (input: f32[64]) -> f32[16] {
  %input = f32[64]{0} parameter(0)
  %reduced = f32[64]{0} all-reduce(%input), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %at = s32[] constant(0)
  ROOT %own = f32[16]{0} dynamic-slice(%reduced, %at), dynamic_slice_sizes={16}
}

%body (carried: (s32[], bf16[10,64], bf16[16,16])) -> (s32[], bf16[10,64], bf16[16,16]) {
  %carried = (s32[], bf16[10,64]{1,0}, bf16[16,16]{1,0:S(1)}) parameter(0)
  %counter = s32[] get-tuple-element(%carried), index=0
  %weights = bf16[10,64]{1,0} get-tuple-element(%carried), index=1
  %x = bf16[16,16]{1,0:S(1)} get-tuple-element(%carried), index=2
  %one = s32[] constant(1)
  %next = s32[]{:S(6)} add(%counter, %one), frontend_attributes={kernel_metadata={
"a": "%b = f32[9] all-gather(%c)"
}}, metadata={op_name="next"}
  %taken = bf16[1,64]{1,0:S(1)} fusion(%weights, %counter), kind=kLoop, calls=%fused_slice
  %started = (bf16[1,64]{1,0:S(1)}, bf16[8,64]{1,0:S(1)}, u32[]{:S(2)}) fusion(%taken), kind=kCustom, calls=%start
  %y = bf16[16,16]{1,0:S(1)} fusion(%taken, %x), kind=kOutput, calls=%along
  ROOT %carry = (s32[], bf16[10,64]{1,0}, bf16[16,16]{1,0:S(1)}) tuple(%next, %weights, %y)
}

%condition (carried.1: (s32[], bf16[10,64], bf16[16,16])) -> pred[] {
  %carried.1 = (s32[], bf16[10,64]{1,0}, bf16[16,16]{1,0:S(1)}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%carried.1), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%counter.1, %limit), direction=LT
}

ENTRY %main (w: bf16[10,64], x.1: bf16[16,16], g: f32[64]) -> f32[16] {
  %w = bf16[10,64]{1,0} parameter(0)
  %x.1 = bf16[16,16]{1,0:S(1)} parameter(1)
  %g = f32[64]{0} parameter(2)
  %first = s32[] constant(0)
  %start.1 = s32[]{:S(6)} copy(%first)
  %init = (s32[], bf16[10,64]{1,0}, bf16[16,16]{1,0:S(1)}) tuple(%start.1, %w, %x.1)
  %loop = (s32[], bf16[10,64]{1,0}, bf16[16,16]{1,0:S(1)}) while(%init), condition=%condition, body=%body
  %send = (f32[64]{0:S(5)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%g)
  %sent = f32[64]{0:S(5)} copy-done(%send)
  %go = (f32[64]{0:S(1)}, f32[64]{0:S(1)}, u32[]{:S(2)}) collective-permute-start(%g), source_target_pairs={{0,1},{1,0}}
  %gone = f32[64]{0:S(1)} collective-permute-done(%go)
  %swapped = f32[64]{0:S(1)} all-to-all(%gone), replica_groups=[2,4]<=[8], dimensions={0}
  %whole = f32[64]{0:S(1)} all-reduce(%swapped), replica_groups={}, to_apply=%add
  ROOT %out = f32[16]{0:S(1)} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_program_as_the_tpu_compiler_writes_it():
    work = analyse(TPU_MODULE)
    assert work.flops == 10 * 2 * 16**3
    assert dict(work.collectives) == {
        "all-gather": 10, "collective-permute": 1, "all-to-all": 1, "all-reduce": 1, "reduce-scatter": 1
    }  # fmt: skip
    # what spans several fusions is one gather a trip; what a reduce-scatter is fused with is no all-reduce
    assert dict(work.received) == {
        "all-gather": 10 * 8 * 64 * 2 * 7 / 8,
        "collective-permute": 256,
        "all-to-all": 256 * 3 / 4,
        "all-reduce": 2 * 256 * 7 / 8,
        "reduce-scatter": 256 * 3 / 4,
    }
    # a trip reads one slice of the weights, and counts; a copy to the host and a permutation read g
    assert work.hbm_bytes == 10 * (64 * 2 + 4 + 4 + 4) + 4 + 256 + 256
    assert work.host_bytes == 256


@functools.cache
def compiled_twice(sizes):
    return jax.jit(lambda x: x @ x).lower(matrix(sizes, sizes)).compile().as_text()


def test_work_adds_and_scales():
    one = analyse(compiled_twice(N))
    assert (one + one * 2).flops == 3 * SQUARE and (one * 0.5).hbm_bytes == one.hbm_bytes / 2
    assert one.hbm_bytes == 2 * 4 * N * N  # the one operand and the result


IN_PLACE = """HloModule jit_step, is_scheduled=true

%copy_fusion (input: s8[32,64,128]) -> s8[32,64,128] {
  %input = s8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy.1 = s8[32,64,128]{2,1,0:T(8,128)(4,1)} copy(%input)
}

%one_layer (param_0: s8[32,64,128], param_1: s32[]) -> bf16[1,64,128] {
  %param_0 = s8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %fusion.1 = s8[32,64,128]{2,1,0:T(8,128)(4,1)} fusion(%param_0), output_to_operand_aliasing={{}: (0, {})}, calls=%copy_fusion
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice.1 = s8[1,64,128]{2,1,0:T(8,128)(4,1)} dynamic-slice(%fusion.1, %param_1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %convert.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} convert(%slice.1)
}

ENTRY %main (weights: s8[32,64,128], index: s32[]) -> bf16[1,64,128] {
  %weights = s8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %index = s32[] parameter(1)
  ROOT %fusion.2 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} fusion(%weights, %index), kind=kLoop, calls=%one_layer
}
"""


def test_a_layer_of_a_stack_that_is_read_under_another_tiling_counts_once():
    """As the TPU compiler writes 8-bit weights: the layer is read and its cast written, beside the index."""
    assert analyse(IN_PLACE).hbm_bytes == pytest.approx(64 * 128 * (1 + 2), abs=8)
