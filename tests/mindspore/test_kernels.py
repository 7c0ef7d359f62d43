"""Every kernel of the CPU against torch's operator of that name."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

random = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return (random.standard_normal(shape) * scale + shift).astype(np.float32)


# case: (kernel, arrays, keywords)
CASES = {
    "linear": ("linear", [normal(2, 5, 24), normal(8, 24), normal(8)], {}),
    "linear, large": ("linear", [normal(2, 77, 320), normal(320, 320), normal(320)], {}),
    "linear without bias": ("linear", [normal(3, 24), normal(8, 24)], {}),
    "linear, half weights": ("linear", [normal(2, 77, 96), normal(96, 96).astype(np.float16),
                                        normal(96).astype(np.float16)], {}),
    "conv2d": ("conv2d", [normal(2, 6, 9, 11), normal(5, 6, 3, 3), normal(5)], {"padding": 1}),
    "conv2d, many bands": ("conv2d", [normal(2, 64, 70, 66), normal(32, 64, 3, 3, scale=0.1), normal(32)], {"padding": 1}),
    "conv2d, half the size": ("conv2d", [normal(1, 6, 10, 13), normal(5, 6, 3, 3), normal(5)], {"padding": 1, "stride": 2}),
    "conv2d, padded before": ("conv2d", [normal(1, 6, 10, 13), normal(5, 6, 3, 3)], {"stride": 2}),
    "conv2d, one by one": ("conv2d", [normal(2, 64, 9, 11), normal(48, 64, 1, 1), normal(48)], {}),
    "conv2d, uneven": ("conv2d", [normal(1, 4, 12, 12), normal(3, 4, 3, 5)],
                       {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)}),
    "conv2d, half weights": ("conv2d", [normal(1, 6, 9, 9), normal(5, 6, 3, 3).astype(np.float16),
                                        normal(5).astype(np.float16)], {"padding": 1}),
    "layer_norm": ("layer_norm", [normal(2, 7, 48, shift=10)], {"normalized_shape": [48]}),
    "layer_norm, scaled": ("layer_norm", [normal(2, 7, 48, scale=3)],
                           {"normalized_shape": [48], "weight": normal(48), "bias": normal(48), "eps": 1e-6}),
    "group_norm": ("group_norm", [normal(2, 64, 5, 7, shift=20)],
                   {"num_groups": 32, "weight": normal(64), "bias": normal(64), "eps": 1e-6}),
    "group_norm of rows": ("group_norm", [normal(2, 64, 35)], {"num_groups": 32}),
    "silu": ("silu", [normal(3, 500, scale=5)], {}),
    "gelu": ("gelu", [np.concatenate([normal(3, 20000, scale=3), np.full((3, 2), -60, np.float32)], 1)], {}),
    "gelu, tanh": ("gelu", [normal(3, 500, scale=5)], {"approximate": "tanh"}),
    "embedding": ("embedding", [random.integers(0, 50, (2, 7)).astype(np.int32), normal(50, 8)], {}),
    "pad": ("pad", [normal(1, 3, 4, 5)], {"pad": [0, 1, 2, 3]}),
    "interpolate": ("interpolate", [normal(2, 3, 5, 6)], {"size": [10, 12]}),
    "interpolate, odd": ("interpolate", [normal(2, 3, 5, 6)], {"size": [9, 11]}),
    "interpolate by a factor": ("interpolate", [normal(2, 3, 5, 6)], {"scale_factor": 2.0}),
    "arange": ("arange", [], {"start": 3, "end": 40, "step": 5}),
    "attention": ("attention", [normal(2, 33, 3, 16), normal(2, 77, 3, 16), normal(2, 77, 3, 16)], {}),
    "attention, some heads at a time": ("attention", [normal(1, 1100, 5, 8)] * 3, {}),
    "attention, some queries at a time": ("attention", [normal(1, 2300, 1, 8)] * 3, {}),
}


def by_torch(name: str, arrays: list[np.ndarray], keywords: dict) -> np.ndarray:
    tensors = [torch.from_numpy(a.astype(np.float32) if a.dtype == np.float16 else a) for a in arrays]
    keywords = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in keywords.items()}
    if name == "arange":
        return torch.arange(**keywords).numpy()
    if name == "attention":
        heads = [tensor.transpose(1, 2) for tensor in tensors]
        return functional.scaled_dot_product_attention(*heads).transpose(1, 2).numpy()
    return getattr(functional, name)(*tensors, **keywords).numpy()


@pytest.fixture(scope="module")
def results(inside) -> dict[str, np.ndarray]:
    given, cases = {}, {}
    for case, (name, arrays, keywords) in CASES.items():
        plain = {key: value for key, value in keywords.items() if not isinstance(value, np.ndarray)}
        cases[case] = name, len(arrays), plain, [key for key in keywords if key not in plain]
        given |= {f"{case}/{i}": array for i, array in enumerate(arrays)}
        given |= {f"{case}/{key}": keywords[key] for key in keywords if key not in plain}
    return inside("kernels", given, cases=cases)


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_torchs_operator(results, case):
    expected, got = by_torch(*CASES[case]), results[case]
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * max(1.0, np.abs(expected).max()))


def test_nothing_of_mindspore_changes_unless_the_kernels_are_installed(results):
    assert results["untouched"]
