"""Numbers keep their value on the way to a device and back, in every dtype a network may state."""
import numpy as np
import pytest

from engines.engine import Constant, from_wire, to_wire

VALUES = np.array([0, -0.0, 1, -2.5, 3.14159, 65504, 1e-8, 123456.0], np.float32)


@pytest.mark.parametrize("dtype,bits", [("float32", 24), ("float16", 11), ("bfloat16", 8)])
def test_floats_come_back_within_the_dtypes_precision(dtype, bits):
    values = VALUES[:-2] if dtype == "float16" else VALUES
    back = from_wire(dtype, values.shape, to_wire(values, dtype))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, values, rtol=2.0 ** -bits)


def test_bfloat16_rounds_to_nearest_even_and_keeps_specials():
    # 1 + 2^-8 lies halfway between two bfloat16 values; the even one is 1. A little more goes up.
    values = np.array([1 + 2 ** -8, 1 + 2 ** -8 + 2 ** -20, 1 + 3 * 2 ** -8, np.inf, -np.inf, np.nan], np.float32)
    back = from_wire("bfloat16", values.shape, to_wire(values, "bfloat16"))
    np.testing.assert_array_equal(back, np.array([1, 1 + 2 ** -7, 1 + 2 ** -6, np.inf, -np.inf, np.nan], np.float32))


def test_a_nan_with_any_mantissa_stays_a_nan():
    nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(from_wire("bfloat16", (2,), to_wire(nan, "bfloat16"))).all()


def test_integers_stay_exact():
    timesteps = np.array([999.0, 0.0, 501.0])
    for dtype in ("int32", "int64"):
        back = from_wire(dtype, (3,), to_wire(timesteps, dtype))
        assert back.dtype == dtype and back.tolist() == [999, 0, 501]


def test_views_that_are_not_contiguous_are_sent_in_their_order():
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    np.testing.assert_array_equal(from_wire("float32", (4, 3), to_wire(array, "float32")), array)


def test_a_constant_is_named_by_content_dtype_and_shape():
    zeros = np.zeros((2, 3), np.float32)
    name = lambda array, dtype: Constant(array).wire(dtype)[1]
    assert name(zeros, "float32") == name(zeros.copy(), "float32")
    assert len({name(zeros, "float32"), name(zeros, "float16"), name(zeros.reshape(3, 2), "float32"),
                name(zeros + 1, "float32")}) == 4
