"""The dense yardstick of weights: every product of a decode step on a kernel that reads them at the memory's speed."""

from __future__ import annotations

from typing import Any

from torch import nn

from gossamer import ops
from gossamer.calibration import Calibration
from gossamer.errors import BackendError, ModelError
from gossamer.hf.linear import DecodeLinear
from gossamer.ops.linear import DTYPES
from gossamer.registry import Handle, Method, register


@register("native-linear", slot="none", family="weights", name="Native linear", baseline=True)
class NativeLinear(Method):
    """All linear layers of a decode step on our dense kernel, instead of torch's. Nothing is made sparse.

    A baseline, for two uses: sparse MLPs are fairly compared with it, not with a matrix library that reads the weights at a
    third of the memory's speed; and with the dense part of a step out of the way, what sparse attention saves can be seen
    in the time per token. It takes no slot, so it goes into any recipe. CPU only, float32 and bfloat16, at most 8 rows a
    step (batch times new tokens); prefill and training are left to torch. Logits differ from torch's by rounding.

    >>> from gossamer.models import tiny_model
    >>> with NativeLinear().attach(tiny_model("llama")) as handle:
    ...     handle.report()["native_linear_layers"]
    15
    """

    def attach(self, model: nn.Module, calibration: Calibration | None = None) -> Handle:
        """Route the model's linear layers; the handle takes them back.

        Raises:
            BackendError: the native kernels were not built.
            ModelError: the model has no linear layer on the CPU that the kernel takes.
        """
        if "native" not in ops.available_backends():
            raise BackendError(f"{self.slug} needs the native kernels: reinstall with a C++20 compiler")
        routed = DecodeLinear(model)
        useful = [layer for layer in routed.layers if layer.weight.is_cpu and layer.weight.dtype in DTYPES]
        if not useful:
            routed.detach()
            raise ModelError(
                f"{self.slug} found no float32 or bfloat16 linear layer on the CPU in {type(model).__name__}"
            )

        def report() -> dict[str, Any]:
            return {"native_linear_layers": len(routed.layers), "native_linear_bytes": routed.weight_bytes}

        return Handle(undo=[routed.detach], reports=[report])
