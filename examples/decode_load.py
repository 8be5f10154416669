"""What keeps a GPU busy for `observe_decode_load.py`: decode, prefill, and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from agft_ray.gpu.nvml.backend import list_devices

Step = Callable[[], None]
"""One step of the whole batch, over when it returns."""


class Load(Protocol):
    """What keeps the GPU busy."""

    what: str
    """For people."""

    def uuid(self) -> str:
        """The GPU it runs on, by NVML's name."""
        ...

    def decode(self, batch: int) -> Step: ...

    def prefill(self, tokens: int) -> Step: ...

    def matmul(self) -> Step: ...


class TorchLoad:
    """Decode steps of the shape of Llama-3.1-8B, in half precision."""

    HIDDEN, INTERMEDIATE, KV_HEADS, GROUP, HEAD = 4096, 14336, 8, 4, 128
    MATMUL = 8192

    def __init__(self, device: str, layers: int, context: int) -> None:
        import torch

        self._torch, self._device = torch, torch.device(device)
        self._dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        self._layers, self._context = layers, context
        wide = (self.GROUP + 2) * self.KV_HEADS * self.HEAD
        shapes = [
            (self.HIDDEN, wide),
            (self.GROUP * self.KV_HEADS * self.HEAD, self.HIDDEN),
            (self.HIDDEN, 2 * self.INTERMEDIATE),
            (self.INTERMEDIATE, self.HIDDEN),
        ]
        self._weights = [[self._random(*shape) for shape in shapes] for _ in range(layers)]
        weights_gb = layers * sum(a * b for a, b in shapes) * self._dtype.itemsize / 1e9
        kv_mb = 2 * layers * context * self.KV_HEADS * self.HEAD * self._dtype.itemsize / 1e6
        self.what = (
            f"{layers} layers of the shape of Llama-3.1-8B, {str(self._dtype).rpartition('.')[2]}, "
            f"PyTorch {torch.__version__}: each step reads {weights_gb:.1f} GB of weights, and "
            f"{kv_mb:.0f} MB of KV cache for each sequence (context {context} tokens)"
        )

    def _random(self, *shape: int) -> Any:
        return self._torch.randn(*shape, device=self._device, dtype=self._dtype) * 0.01

    def uuid(self) -> str:
        if self._device.type != "cuda":
            return str(list_devices()[0].uuid)
        return f"GPU-{self._torch.cuda.get_device_properties(self._device).uuid}"

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)

    def decode(self, batch: int) -> Step:
        torch, attend = self._torch, self._torch.nn.functional.scaled_dot_product_attention
        cache = (batch, self.KV_HEADS, self._context, self.HEAD)
        caches = [(self._random(*cache), self._random(*cache)) for _ in range(self._layers)]
        first = self._random(batch, self.HIDDEN)
        heads = self.GROUP * self.KV_HEADS * self.HEAD

        def attention(layer: int, qkv: Any) -> Any:
            query = qkv[:, :heads].view(batch, self.KV_HEADS, self.GROUP, self.HEAD)
            return attend(query, *caches[layer]).reshape(batch, heads)

        return torch.inference_mode()(lambda: self._layers_of(first, attention))

    def prefill(self, tokens: int) -> Step:
        torch, attend = self._torch, self._torch.nn.functional.scaled_dot_product_attention
        first = self._random(tokens, self.HIDDEN)
        sizes = [self.GROUP * self.KV_HEADS * self.HEAD] + 2 * [self.KV_HEADS * self.HEAD]

        def attention(_: int, qkv: Any) -> Any:
            query, keys, values = (
                part.view(1, tokens, -1, self.HEAD).transpose(1, 2)
                for part in qkv.split(sizes, dim=1)
            )
            found = attend(query, keys, values, is_causal=True, enable_gqa=True)
            return found.transpose(1, 2).reshape(tokens, sizes[0])

        return torch.inference_mode()(lambda: self._layers_of(first, attention))

    def _layers_of(self, x: Any, attention: Callable[[int, Any], Any]) -> None:
        for layer, (qkv, out, up, down) in enumerate(self._weights):
            x = x + attention(layer, x @ qkv) @ out
            gate, linear = (x @ up).chunk(2, dim=1)
            x = x + (self._torch.nn.functional.silu(gate) * linear) @ down
        self._wait()

    def matmul(self) -> Step:
        a, b = self._random(self.MATMUL, self.MATMUL), self._random(self.MATMUL, self.MATMUL)

        def step() -> None:
            for _ in range(10):
                a @ b
            self._wait()

        return step
