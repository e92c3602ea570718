"""Peak arithmetic of accelerators, and model FLOPs utilisation (MFU), the share that a run uses.

MFU (Chowdhery et al. 2022, PaLM, appendix B) is the arithmetic that the mathematics of the model
asks for, per second, over the peak of all devices. The arithmetic is that of
`moejax.planning.count.count`, forward and backward: matrix products of the parameters that a
token uses, so of its `moe.top_k` experts alone, and attention with all positions of the row, of
which the causal mask takes nothing off. What is computed again (remat), empty slots, and padding
count as nothing.
"""

import jax

from moejax.config import Config
from moejax.planning.count import count

PEAK_BFLOAT16 = {
    # NVIDIA A100 Tensor Core GPU data sheet: 312 TFLOPS, in every form of the card.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    # NVIDIA H100 Tensor Core GPU data sheet: 1,979 TFLOPS (SXM) and 1,513 (PCIe) with sparsity, of
    # which half without.
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    # NVIDIA H200 Tensor Core GPU data sheet: 1,979 TFLOPS with sparsity.
    "NVIDIA H200": 989.5e12,
    # NVIDIA DGX B200 data sheet: 36 PFLOPS of 8 GPUs with sparsity.
    "NVIDIA B200": 2250e12,
    # cloud.google.com/tpu/docs: peak compute per chip (bf16), of which jax makes one device.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""FLOPs per second of dense bfloat16 products, by `device_kind` of jax.

A device that is not listed has no MFU.
"""


def utilisation_of_token(config: Config) -> float | None:
    """Returns the MFU at one token per second on all devices.

    Args:
      config: resolved.

    Returns:
      None where it is not known: the device is not in `PEAK_BFLOAT16`, the model does not compute
      in bfloat16, or its arithmetic changes with `schedule.top_k`.
    """
    device, *_ = jax.devices()
    peak = PEAK_BFLOAT16.get(device.device_kind)
    if peak is None:
        return None
    if config.model.compute_dtype != "bfloat16":
        return None
    if config.schedule.top_k != "constant":
        return None
    peak_of_all = peak * jax.device_count()
    return count(config).flops_per_token / peak_of_all


def peak_memory_bytes() -> int | None:
    """Returns the most memory that was in use at a time on any one device of this process.

    None where devices do not count it, as on CPU.
    """
    peaks = []
    for device in jax.local_devices():
        statistics = device.memory_stats() or {}
        peaks.append(statistics.get("peak_bytes_in_use"))
    known = [peak for peak in peaks if peak is not None]
    return max(known, default=None)
