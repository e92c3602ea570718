"""Arithmetic counted from the text of compiled programs, compared with what is known of them."""

import jax
import jax.numpy as jnp
import pytest

from moejax.planning.hlo.arithmetic import Arithmetic, UnknownKernelError, count_arithmetic

PRODUCT = """
%fused_dot (parameter_0: f32[8,16], parameter_1: f32[16,4]) -> f32[8,4] {
  %parameter_0 = f32[8,16]{1,0} parameter(0)
  %parameter_1 = f32[16,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%parameter_0, %parameter_1), \
lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
ONE_PRODUCT = 2 * 8 * 16 * 4


def program(lines, *computations):
    """Returns the text of a program of these instructions, after `PRODUCT` and computations."""
    before = "".join(computations)
    body = "\n".join(f"  {line}" for line in lines)
    entry = f"ENTRY %main.1 (x: f32[8,16]) -> f32[8] {{\n{body}\n}}\n"
    return f"HloModule jit_f\n{PRODUCT}{before}\n{entry}"


def loop(trips):
    """Returns a program with a loop around one product."""
    config = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips else ""
    body = """
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %fusion.7 = f32[8,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused_dot
  %call.7 = f32[8,4]{1,0} custom-call(%fusion.7), custom_call_target="polish"
  ROOT %tuple.7 = (s32[], f32[8,4]{1,0}) tuple(%i, %fusion.7)
}
%condition (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
"""
    line = (
        "%while.1 = (s32[], /*index=1*/f32[8,4]{1,0}) while(%t), condition=%condition, "
        f"body=%body{config}"
    )
    return program([line, "ROOT %out = f32[8,4]{1,0} get-tuple-element(%while.1), index=1"], body)


def test_a_product_in_a_fusion_counts_once_for_each_call():
    call = "%fusion.{} = f32[8,4]{{1,0}} fusion(%x, %w), kind=kCustom, calls=%fused_dot"
    counted = count_arithmetic(program([call.format(1), call.format(2)]))
    assert counted == Arithmetic(2 * ONE_PRODUCT, {}, 0)


def test_batched_products_and_several_contracted_axes_count_in_full():
    lines = [
        "%x = bf16[5,8,16]{2,1,0} parameter(0)",
        "%w = bf16[5,8,16]{2,1,0} parameter(1)",
        "%dot.3 = f32[5,8,8]{2,1,0} dot(%x, %w), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
        "rhs_batch_dims={0}",
        "%dot.4 = f32[5,5]{1,0} dot(%x, %w), lhs_contracting_dims={1,2}, "
        "rhs_contracting_dims={1,2}",
    ]
    assert count_arithmetic(program(lines)).flops == 2 * 5 * 8 * 8 * 16 + 2 * 5 * 5 * 8 * 16


def test_loops_count_as_often_as_they_run_and_those_that_depend_on_data_once():
    assert count_arithmetic(loop(12)) == Arithmetic(12 * ONE_PRODUCT, {"polish": 12}, 0)
    assert count_arithmetic(loop(None)) == Arithmetic(ONE_PRODUCT, {"polish": 1}, 1)


def test_both_sides_of_a_branch_count():
    line = (
        "%c = f32[8,4]{1,0} conditional(%p, %a, %b), branch_computations={%fused_dot, %fused_dot}"
    )
    assert count_arithmetic(program([line])).flops == 2 * ONE_PRODUCT


def kernel(target, result, operands, op_name="jit(f)/pallas_call"):
    shapes = ", ".join(f"%o.{i}" for i in range(len(operands)))
    parameters = [f"%o.{i} = {operand} parameter({i})" for i, operand in enumerate(operands)]
    attributes = f'custom_call_target="{target}", metadata={{op_name="{op_name}"}}'
    return [*parameters, f"%call.1 = {result} custom-call({shapes}), {attributes}"]


TRITON = (
    r"tokamax:{\"op\":{\"__type\":\"tokamax._src.ops.ragged_dot.pallas_triton."
    r"PallasTritonRaggedDot\"}}/pallas_call"
)


@pytest.mark.parametrize(
    ("result", "operands"),
    [
        (
            "bf16[80,32]{1,0}",
            ["bf16[80,16]{1,0}", "bf16[4,16,32]{2,1,0}", "s32[4]{0}", "s32[4]{0}"],
        ),
        (
            "bf16[4,16,32]{2,1,0}",
            ["bf16[80,16]{1,0}", "bf16[80,32]{1,0}", "s32[4]{0}", "s32[4]{0}"],
        ),
    ],
    ids=["rows by matrices", "outer products"],
)
def test_a_grouped_kernel_counts_every_row_by_one_matrix(result, operands):
    counted = count_arithmetic(program(kernel("__gpu$xla.gpu.triton", result, operands, TRITON)))
    assert (counted.flops, counted.kernels) == (2 * 80 * 16 * 32, {"tokamax triton": 1})


def test_kernels_of_tpu_have_their_own_names_and_bookkeeping_is_left_out():
    operand, call = kernel("tpu_custom_call", "bf16[8,4]{1,0}", ["bf16[8,16]{1,0}"])
    lines = [
        operand,
        call.replace("%call.1", "%ragged-dot-none.1"),
        *kernel("AllocateBuffer", "s32[1]{0}", []),
    ]
    assert count_arithmetic(program(lines)).kernels == {"ragged-dot-none": 1}


def test_a_product_of_a_library_whose_arithmetic_is_unknown_is_an_error():
    sort = kernel("__cub$DeviceRadixSort", "s32[8]{0}", ["s32[8]{0}"])
    assert count_arithmetic(program(sort)).flops == 0
    gemm = kernel("__cublas$gemm", "f32[8,4]{1,0}", ["f32[8,16]{1,0}", "f32[16,4]{1,0}"])
    with pytest.raises(UnknownKernelError, match=r"__cublas\$gemm is a product"):
        count_arithmetic(program(gemm))


def test_text_without_a_program_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        count_arithmetic("HloModule nothing")


def test_a_program_compiled_here_has_the_arithmetic_that_was_written():
    def run(x, w, v):
        y = jax.lax.fori_loop(0, 5, lambda i, y: jnp.sin(y) @ w, x)
        return jnp.einsum("ab,cb->ac", y, v)

    shapes = (8, 16), (16, 16), (4, 16)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(run).lower(*arguments).compile()
    counted = count_arithmetic(compiled.as_text())
    assert counted.flops == 2 * 8 * 16 * 16 * 5 + 2 * 8 * 16 * 4
