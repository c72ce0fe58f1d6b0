"""How the demo computes here: which precision is faster."""

from __future__ import annotations

import contextlib
import time

import torch

# bfloat16 rounds to 3 digits: it has to be clearly faster to be worth it.
_WORTH_IT = 1.3


def bf16_pays() -> tuple[bool, str]:
    """(is bfloat16 autocast worth it here, one line that says why). Timed on the CPU: only some of them have the units."""
    if torch.cuda.is_available():
        good = torch.cuda.is_bf16_supported()
        return good, f"{torch.cuda.get_device_name()}, {'bfloat16 autocast' if good else 'float32'}"
    a, b = torch.randn(512, 576), torch.randn(576, 1536)
    slow, fast = _seconds(a, b), _seconds(a.bfloat16(), b.bfloat16())
    cores = f"{torch.get_num_threads()} CPU threads"
    if slow > _WORTH_IT * fast:
        return True, f"{cores}, bfloat16 autocast ({slow / fast:.1f} times faster here than float32)"
    return False, f"{cores}, float32 (bfloat16 is not faster here)"


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """The best of several times for one product: the others had the machine's attention elsewhere."""
    times = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return min(times)


def precision(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
