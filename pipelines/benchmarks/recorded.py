"""A training step on small patches with and without recorded passes (`training.cuda_graph`), on a CUDA GPU.

Networks for hippocampus (40 x 56 x 40, batch 2, bfloat16 by autocast, AdamW, mean square of outputs), 20 steps after 12
that are not counted. A recorded step must have the losses of the plain one.

    python pipelines/benchmarks/recorded.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from accuracy import dynunet

FEATURES = (16, 32, 64, 128)
PATCH, BATCH = (40, 56, 40), 2
UNCOUNTED, COUNTED = 12, 20
WAYS = {"plain": {}, "fused AdamW": {"fused": True}, "recorded, fused AdamW": {"fused": True, "record": True}}
NETWORKS: dict[str, dict[str, Any]] = {
    "plain twin": {"basis": None},
    "dynunet": {},
    "ukanet, all stages": {"basis": "gram"},
    "ukanet, coarse stages": {"basis": "gram", "kan_stages": "coarse"},
}


def main() -> None:
    """Print milliseconds, memory and losses, network by network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    given = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA GPU.")
    torch.backends.cudnn.benchmark = True
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in given.networks:
        for way, options in WAYS.items():
            milliseconds, megabytes, losses = measure(name, **options)
            shown = " ".join(f"{loss:.6f}" for loss in (losses[0], losses[10], losses[-1]))
            print(f"{name:22}{way:23}{milliseconds:8.2f} ms{megabytes:7.0f} MB  losses {shown}", flush=True)


def make(name: str) -> Any:
    """A network; DynUNet with deep supervision, whose outputs are one tensor."""
    from monai.networks.nets import DynUNet

    from kanseg import UKANet

    if name == "dynunet":
        return DynUNet(3, 1, 3, **dynunet(FEATURES, 3)["options"]["arguments"])
    return UKANet(3, 1, 3, features_per_stage=FEATURES, **NETWORKS[name])


def measure(name: str, record: bool = False, fused: bool = False) -> tuple[float, float, Sequence[float]]:
    """Milliseconds of a step, megabytes at most, and the losses."""
    import torch

    from kanseg.training.devices import record_passes

    torch.manual_seed(0)
    network = make(name).cuda().train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=fused)
    x = torch.randn(BATCH, 1, *PATCH, device="cuda")
    plain = network.forward

    def forward(image: torch.Tensor) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return plain(image)

    network.forward = forward
    if record:
        record_passes(network, x)
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        loss = network(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    for _ in range(UNCOUNTED):
        step()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for _ in range(COUNTED):
        step()
    seconds = (time.perf_counter() - begun) / COUNTED
    return 1e3 * seconds, torch.cuda.max_memory_allocated() / 2**20, losses


if __name__ == "__main__":
    main()
