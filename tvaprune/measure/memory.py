"""Peak memory of a stretch of work: what a method needs, in the figure that decides whether it fits."""

import threading
from types import TracebackType

import psutil
import torch

SAMPLING_SECONDS = 0.01


class PeakMemory:
    """Context manager that measures the largest memory in use while it is open.

    On CUDA that is what torch had allocated on the device. On a CPU it is the resident set of this process, sampled by
    a thread: a peak shorter than `SAMPLING_SECONDS` may be missed, and memory that an earlier stretch did not give
    back counts.

    Attributes:
        before: Bytes in use at the start.
        peak: Bytes at the peak, the start included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self.peak = 0
        self._process = psutil.Process()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = self.peak = torch.cuda.memory_allocated(self.device)
        else:
            self.before = self.peak = self._process.memory_info().rss
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._end.set()
            self._thread.join()
            self._sample()

    def _watch(self) -> None:
        while not self._end.wait(SAMPLING_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)
