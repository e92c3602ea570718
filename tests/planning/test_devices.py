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
    tokens_per_s = 1e6
    utilisation = devices.utilisation_of_token(config) * tokens_per_s
    flops_per_s = count(config).flops_per_token * tokens_per_s
    peak_of_both = 2 * 275e12
    assert utilisation == pytest.approx(flops_per_s / peak_of_both)


def test_more_experts_that_no_token_visits_add_only_their_logits(monkeypatch):
    have(monkeypatch, Accelerator("NVIDIA H200"))
    peak = devices.PEAK_BFLOAT16["NVIDIA H200"]
    bfloat16 = {"compute_dtype": "bfloat16"}
    few = small_config(model=bfloat16, moe={"num_experts": 4, "top_k": 2})
    many = small_config(model=bfloat16, moe={"num_experts": 64, "top_k": 2})
    flops_of_few = devices.utilisation_of_token(few) * peak
    flops_of_many = devices.utilisation_of_token(many) * peak
    # Forward and backward, 60 more logits in each layer.
    router_flops = 3 * 2 * 60 * few.model.d_model * few.num_moe_layers
    assert flops_of_many - flops_of_few == pytest.approx(router_flops)


def test_utilisation_is_absent_where_it_is_not_known(monkeypatch):
    bfloat16 = {"model": {"compute_dtype": "bfloat16"}}
    assert devices.utilisation_of_token(small_config(**bfloat16)) is None  # on CPU
    have(monkeypatch, Accelerator("NVIDIA H200"))
    assert devices.utilisation_of_token(small_config(**bfloat16)) is not None
    assert devices.utilisation_of_token(small_config()) is None  # float32 has another peak
    schedule = ScheduleConfig(top_k="step 0.5 0.5")
    falling = dataclasses.replace(small_config(**bfloat16), schedule=schedule)
    assert devices.utilisation_of_token(falling) is None
    have(monkeypatch, Accelerator("NVIDIA GeForce RTX 9090"))
    assert devices.utilisation_of_token(small_config(**bfloat16)) is None


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    assert devices.peak_memory_bytes() is None  # on CPU
    have(monkeypatch, Accelerator("a", 5), Accelerator("a", 7), Accelerator("a"))
    assert devices.peak_memory_bytes() == 7
