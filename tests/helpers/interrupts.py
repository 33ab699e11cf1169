"""Ctrl-C at a line: a tracer that raises ``KeyboardInterrupt`` at one line of the package."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as modules

import torch_hf
from torch_hf.capture import tangents

PACKAGE = str(Path(torch_hf.__file__).parent)


class Line(NamedTuple):
    """A line of the package, and how many lines had run in the package before it."""

    place: str
    index: int


class Tracer:
    """Counts the package's lines as they run; raises at one of them if asked to.

    Args:
        interrupt_at: The number of that line; None for none.
        error: What is raised there.
    """

    def __init__(
        self, interrupt_at: int | None = None, error: type[BaseException] = KeyboardInterrupt
    ) -> None:
        self.interrupt_at = interrupt_at
        self.error = error
        self.lines: list[Line] = []
        self.counting = True

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and self.counting:
            place = f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
            self.lines.append(Line(place, len(self.lines)))
            if len(self.lines) - 1 == self.interrupt_at:
                raise self.error(place)  # which ends the tracing
        return self._line

    def run(self, step: Callable[[], Any]) -> BaseException | None:
        """Runs a step; what it raised."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            step()
        except BaseException as error:
            return error
        finally:
            sys.settrace(before)
        return None


def settings() -> dict[str, Any]:
    """What a step switches over in the process, and must not leave behind."""
    return {
        "hooks": len(modules._global_forward_pre_hooks) + len(modules._global_forward_hooks),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast depth": (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()),
        "attention": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ],
        "cudnn": torch.backends.cudnn.enabled,
        "precision": torch.get_float32_matmul_precision(),
        "tangents": tangents.are_tangents_all(),
    }
