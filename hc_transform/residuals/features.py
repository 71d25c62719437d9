"""Which axis of a residual's value holds its features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..graphs.dialects import is_lifted, name_of
from ..graphs.operations import shape_of
from .findings import Residual

LAYER_AXES = {
    **dict.fromkeys("conv1d conv2d conv3d batch_norm group_norm instance_norm".split(), 1),
    **dict.fromkeys("linear layer_norm rms_norm".split(), -1),
}


def feature_axis(residual: Residual, modules: Mapping[str, nn.Module]) -> tuple[int, int | None]:  # noqa: C901  # one sign after the other
    """Return the feature axis of a residual's value, -1 or 1, and its size (None if unknown).

    The first layer of the branch tells: a convolution or batch norm has its features on axis 1,
    a linear layer or layer norm on the last one, unless its size is that of the other axis alone (the
    branch permutes its input). Layers whose size fits neither axis are passed over.
    """
    shape = shape_of(residual.skip)
    for node in sorted(residual.region):
        if shape is not None and node.op == "call_function" and name_of(node) in LAYER_AXES:
            axis = LAYER_AXES[name_of(node)]
            if len(shape) > 1 and shape_of(node.all_input_nodes[0]) == shape:
                return axis, shape[axis]
        if node.op != "call_module":
            continue
        for module in modules[str(node.target)].modules():
            axis, size = _layer_axis(module)
            if size is None:
                continue
            if shape is None:
                return axis, size
            for candidate in (axis, -1 if axis == 1 else 1):
                if -len(shape) <= candidate < len(shape) and shape[candidate] == size:
                    return candidate, size
    if shape is None:
        return -1, None
    return (1, shape[1]) if len(shape) >= 4 and shape[1] > shape[-1] else (-1, shape[-1])


def no_features(residuals: Sequence[Residual], modules: Mapping[str, nn.Module]) -> bool:
    """Whether no axis of a trunk's values is one that its branches have weights for: all are lengths of the input.

    So it is with scores of attention ``(B, H, N, N)`` that a layer adds to those of the layer before. A branch without
    weights, such as a Fourier transform, says nothing.
    """
    weighed = False
    for residual in residuals:
        shape = shape_of(residual.skip)
        sizes = {size for weight in _shapes_of_weights(residual, modules) for size in weight}
        if shape is None or len(shape) < 2 or not sizes.isdisjoint((shape[1], shape[-1])):
            return False
        weighed = weighed or bool(sizes)
    return weighed


def _shapes_of_weights(residual: Residual, modules: Mapping[str, nn.Module]) -> Iterator[torch.Size]:
    for node in residual.region:
        if node.op == "call_module":
            yield from (parameter.shape for parameter in modules[str(node.target)].parameters())
        yield from (shape_of(n) or torch.Size() for n in node.all_input_nodes if n.op == "get_attr" or is_lifted(n))


def _layer_axis(module: nn.Module) -> tuple[int, int | None]:
    """Return where a layer has its input features, and how many."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1, module.in_channels
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return 1, module.num_features
    if isinstance(module, nn.GroupNorm):
        return 1, module.num_channels
    if type(module) is nn.Linear:
        return -1, module.in_features
    if type(module) is nn.LayerNorm or type(module) is nn.RMSNorm:
        return -1, module.normalized_shape[-1]
    if type(module) is nn.MultiheadAttention:
        return -1, module.embed_dim
    return -1, None
