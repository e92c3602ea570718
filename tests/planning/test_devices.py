"""Model FLOPs utilisation: known where the device is, and the arithmetic that it is a share of."""

import dataclasses

import jax
import pytest

from cases.training import small_config
from moejax.config import ScheduleConfig
from moejax.planning import devices
from moejax.planning.count import count


@dataclasses.dataclass
class Accelerator:
    """A device as far as these functions look at it."""

    device_kind: str
    peak: int | None = None

    def memory_stats(self):
        """Of jax: None where a platform keeps none."""
        return None if self.peak is None else {"peak_bytes_in_use": self.peak, "bytes_in_use": 1}


def have(monkeypatch, *found):
    monkeypatch.setattr(jax, "devices", lambda: list(found))
    monkeypatch.setattr(jax, "local_devices", lambda: list(found))
    monkeypatch.setattr(jax, "device_count", lambda: len(found))


def test_utilisation_is_the_models_arithmetic_over_the_peak_of_all_devices(monkeypatch):
    config = small_config(model={"compute_dtype": "bfloat16"})
    have(monkeypatch, Accelerator("TPU v4"), Accelerator("TPU v4"))
    speed = 1e6  # tokens a second
    flops_per_s = count(config).flops_per_token * speed
    assert devices.utilisation_of_token(config) * speed == pytest.approx(flops_per_s / (2 * 275e12))


def test_more_experts_that_no_token_visits_change_no_utilisation_but_by_the_router(monkeypatch):
    have(monkeypatch, Accelerator("NVIDIA H200"))
    few, many = (
        small_config(model={"compute_dtype": "bfloat16"}, moe={"num_experts": n, "top_k": 2})
        for n in (4, 64)
    )
    per_token = [
        devices.utilisation_of_token(config) * devices.PEAK_BFLOAT16["NVIDIA H200"]
        for config in (few, many)
    ]
    router = (
        3 * 2 * 60 * few.model.d_model * few.num_moe_layers
    )  # forward and backward, 60 more logits
    assert per_token[1] - per_token[0] == pytest.approx(router)


def test_utilisation_is_absent_where_it_is_not_known(monkeypatch):
    bfloat16 = {"model": {"compute_dtype": "bfloat16"}}
    assert devices.utilisation_of_token(small_config(**bfloat16)) is None  # on CPU
    have(monkeypatch, Accelerator("NVIDIA H200"))
    assert devices.utilisation_of_token(small_config(**bfloat16)) is not None
    assert devices.utilisation_of_token(small_config()) is None  # float32 has another peak
    falling = dataclasses.replace(
        small_config(**bfloat16), schedule=ScheduleConfig(top_k="step 0.5 0.5")
    )
    assert devices.utilisation_of_token(falling) is None
    have(monkeypatch, Accelerator("NVIDIA GeForce RTX 9090"))
    assert devices.utilisation_of_token(small_config(**bfloat16)) is None


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    assert devices.peak_memory_bytes() is None  # on CPU
    have(monkeypatch, Accelerator("a", 5), Accelerator("a", 7), Accelerator("a"))
    assert devices.peak_memory_bytes() == 7
