"""Systematic resampling within islands.

References:
    Carpenter, Clifford & Fearnhead (1999), IEE Proc. Radar, Sonar Navig. 146, 2-7.
"""

__all__ = ["systematic_resample"]

import torch
from torch import Tensor


def systematic_resample(log_weights: Tensor, num: int) -> tuple[Tensor, ...]:
    """Indices of ``num`` survivors an island, by one stratified uniform an island.

    Args:
        log_weights: Shape ``(M, N)``.
        num: Survivors wanted of each of the ``M`` islands.

    Returns:
        Index tensors ``(island, particle)``, each of shape ``(M, num)``.
    """
    weights = log_weights.softmax(-1)
    islands = torch.arange(len(weights), device=weights.device)[:, None]
    ticks = torch.arange(num, device=weights.device, dtype=weights.dtype)
    positions = (ticks + torch.rand_like(weights[:, :1])) / num
    chosen = torch.searchsorted(weights.cumsum(-1), positions)
    return islands.expand(-1, num), chosen.clamp(max=log_weights.shape[-1] - 1)
