"""The family of mHC: reads and writes through sigmoids, and h_res kept on a manifold.

A variant says how h_res is made from logits, and which logits it starts from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from ..streams.mixing import full_precision
from .base import Connection, starting_reads, starting_writes
from .numbers import Numbers, on_tensors
from .projection import EPS, project_flattened
from .sinkhorn import sinkhorn

SCALE = 0.01
READ_PEAK = 0.9  # start "paper": h_pre of the stream that is read; a sigmoid has no 1
KEPT = 0.9  # diagonal of h_res at the start: far from the edge of the manifold, where gradients vanish
MAX_PERMUTATIONS = 720
MAX_UNROLLED_PERMUTATIONS = 6  # more make a compiled kernel too large to fuse


class ConstrainedConnection(Connection):
    """Reads, writes and mixing of mHC, arXiv 2512.24880, eq. 7 and 8, with any h_res.

    With ``x = RMSNorm(all streams, flattened)``, one projection W and three scales::

        h_pre  =     sigmoid(scale_pre  * (x @ W_pre)  + bias_pre)
        h_post = 2 * sigmoid(scale_post * (x @ W_post) + bias_post)
        h_res  =    manifold(scale_res  * (x @ W_res)  + bias_res)

    The norm has no gain (a gain is part of W) and is applied after the projection. W starts at zero
    (the papers draw it at random), the scales at 0.01, the biases so that the function is preserved:
    start "paper" reads 0.9 of stream ``index mod n`` and shares the rest among the others, start
    "mirrored" reads the mean and writes with weights over [0.5, 1.5].

    Args:
        num_streams, settings: as for :class:`Connection`; ``dim`` is needed.
        eps: added to h_pre, as DeepSeek-V4 does with 1e-6. In "mhc" the rows of h_res then sum to 1 - eps:
            each residual scales the streams by that much.
        norm_eps: of the RMS norm.
    """

    needs_dim = True
    min_streams = 2

    def __init__(self, num_streams: int, *, eps: float = 0.0, norm_eps: float = EPS, **settings: Any) -> None:
        super().__init__(num_streams, **settings)
        assert self.dim is not None  # checked by the base class
        self.eps = eps
        self.norm_eps = norm_eps
        starts = (
            torch.logit(starting_reads(num_streams, self.index, self.init, READ_PEAK) - eps),
            torch.logit(starting_writes(num_streams, self.init) / 2),
            self.starting_logits(),
        )
        self.sizes = [start.numel() for start in starts]
        self.projection = nn.Parameter(torch.zeros(num_streams, self.dim, sum(self.sizes)))  # (n, D, 2n + r)
        self.bias_pre = nn.Parameter(starts[0])  # [n]
        self.bias_post = nn.Parameter(starts[1])  # [n]
        self.scale_pre = nn.Parameter(torch.full((1,), SCALE))
        self.scale_post = nn.Parameter(torch.full((1,), SCALE))
        if self.sizes[2]:
            self.bias_res = nn.Parameter(starts[2])  # [r]
            self.scale_res = nn.Parameter(torch.full((1,), SCALE))

    def starting_logits(self) -> Tensor:
        """Return the bias of h_res at the start, ``[r]``."""
        raise NotImplementedError

    def manifold(self, logits: Tensor) -> Tensor:
        """Return h_res ``[..., n, n]`` for ``logits`` ``[..., r]``."""
        raise NotImplementedError

    def coefficients(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return h_pre ``[..., n]`` in (0, 1), h_post ``[..., n]`` in (0, 2) and h_res ``[..., n, n]``."""
        projected = project_flattened(streams, self.projection, self.feature_axis, self.norm_eps)
        pre, post, res = projected.split(self.sizes, -1)
        h_pre = torch.sigmoid(_affine(pre, self.scale_pre, self.bias_pre))
        if self.eps:
            h_pre = h_pre + self.eps
        h_post = 2 * torch.sigmoid(_affine(post, self.scale_post, self.bias_post))
        if not self.sizes[2]:
            return h_pre, h_post, None
        return h_pre, h_post, self.manifold(_affine(res, self.scale_res, self.bias_res))


class MHCConnection(ConstrainedConnection):
    """mHC: h_res is doubly stochastic by Sinkhorn-Knopp.

    Manifold-Constrained Hyper-Connections, arXiv 2512.24880, eq. 7 to 9. h_res starts with 0.9 on
    its diagonal, the rest spread evenly; the paper does not give the start of its biases.
    DeepSeek-V4 is ``eps=1e-6``.

    Args:
        num_streams, settings: as for :class:`ConstrainedConnection`.
        iterations: of Sinkhorn-Knopp; 20 in the paper.
    """

    def __init__(self, num_streams: int, *, iterations: int = 20, **settings: Any) -> None:
        super().__init__(num_streams, **settings)
        self.iterations = iterations

    def starting_logits(self) -> Tensor:
        """Return 0 off the diagonal, and on it what makes it ``KEPT``."""
        n = self.num_streams
        return (torch.eye(n) * math.log(KEPT * (n - 1) / (1 - KEPT))).flatten()

    def manifold(self, logits: Tensor) -> Tensor:
        """Return ``sinkhorn(logits)``, rows being targets."""
        return sinkhorn(logits.unflatten(-1, (self.num_streams,) * 2), self.iterations, self.eps)


class MHCLiteConnection(ConstrainedConnection):
    """mHC-lite: h_res is a convex combination of all n! permutation matrices, so doubly stochastic.

    mHC-lite, arXiv 2601.05732: ``h_res = sum_k softmax(logits)[k] P[k]`` (Birkhoff and von Neumann).
    The identity is the first permutation and starts with weight 0.9; the public implementation
    starts it at logit 0 against -8, where a softmax hardly learns.

    Raises:
        ValueError: for n! above 720.
    """

    permutations: Tensor

    def __init__(self, num_streams: int, **settings: Any) -> None:
        count = math.factorial(num_streams)
        if count > MAX_PERMUTATIONS:
            raise ValueError(
                f"mhc-lite combines all permutations of the streams: {count:,} for num_streams={num_streams}, "
                f"at most {MAX_PERMUTATIONS} are supported. Use 'kromhc' or 'mhc', or fewer streams"
            )
        super().__init__(num_streams, **settings)
        self.register_buffer("permutations", permutation_matrices(num_streams), persistent=False)  # [n!, n, n]

    def starting_logits(self) -> Tensor:
        """Return 0 for all but the identity."""
        return _first_of(math.factorial(self.num_streams), KEPT)

    def manifold(self, logits: Tensor) -> Tensor:
        """Return the combination of permutations."""
        return _combine(logits, self.permutations)


class KromHCConnection(ConstrainedConnection):
    """KromHC: h_res is a Kronecker product of small doubly stochastic matrices.

    KromHC, arXiv 2601.21579: with ``n = i_1 * ... * i_K``, factor k is a convex combination of the
    ``i_k!`` permutations of ``i_k``, and one scale serves all factors. The factors here are the prime
    factors of n, smallest first; the public implementation takes powers of two alone. The diagonal
    of h_res starts at 0.9.

    Raises:
        ValueError: for a prime factor whose factorial is above 720.
    """

    def __init__(self, num_streams: int, **settings: Any) -> None:
        self.factors = prime_factors(num_streams)
        if self.factors and math.factorial(self.factors[-1]) > MAX_PERMUTATIONS:
            raise ValueError(
                f"kromhc combines all permutations of each prime factor of num_streams={num_streams}: "
                f"{math.factorial(self.factors[-1]):,} for {self.factors[-1]}, at most {MAX_PERMUTATIONS} are "
                "supported. Take a number of streams with prime factors of at most 5"
            )
        super().__init__(num_streams, **settings)
        for factor in sorted(set(self.factors)):
            self.register_buffer(f"permutations_{factor}", permutation_matrices(factor), persistent=False)

    def starting_logits(self) -> Tensor:
        """Return, for each factor, 0 for all but the identity."""
        kept = KEPT ** (1 / len(self.factors))
        return torch.cat([_first_of(math.factorial(factor), kept) for factor in self.factors])

    def manifold(self, logits: Tensor) -> Tensor:
        """Return the Kronecker product of the factors' combinations of permutations."""
        parts = logits.split([math.factorial(factor) for factor in self.factors], -1)
        product: Tensor | None = None
        for factor, part in zip(self.factors, parts, strict=True):
            matrix = _combine(part, self.get_buffer(f"permutations_{factor}"))
            product = matrix if product is None else _kronecker(product, matrix)
        assert product is not None
        return product


class IdentityConnection(ConstrainedConnection):
    """Identity hyper-connections: h_res = I; reads and writes as in mHC.

    After Chimera, arXiv 2607.28611. Its text was not at hand: that reads and writes are mHC's (one
    projection of the flattened streams, sigmoid and twice a sigmoid) is assumed.
    """

    def starting_logits(self) -> Tensor:
        """Return no logits."""
        return torch.empty(0)


def permutation_matrices(n: int) -> Tensor:
    """Return all permutation matrices of n, ``[n!, n, n]``, the identity first."""
    return torch.eye(n)[torch.tensor(list(permutations(range(n))))]


def prime_factors(n: int) -> list[int]:
    """Return the prime factors of n, smallest first.

    >>> prime_factors(12)
    [2, 2, 3]
    """
    factors, divisor = [], 2
    while n > 1:
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    return factors


def _affine(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return full_precision(scale) * x + full_precision(bias)


def _first_of(count: int, weight: float) -> Tensor:
    """Return logits whose softmax gives the first of ``count`` entries ``weight``, the others equal shares."""
    logits = torch.zeros(count)
    logits[0] = math.log(weight * (count - 1) / (1 - weight))
    return logits


def _combine(logits: Tensor, matrices: Tensor) -> Tensor:
    """Return ``sum_k softmax(logits)[..., k] matrices[k]``, of all permutation matrices: ``[..., n, n]``."""
    if isinstance(logits, Numbers) and len(logits.entries) <= MAX_UNROLLED_PERMUTATIONS:
        return torch.softmax(logits, -1)[..., _moving(len(matrices[0]))].sum(-1)
    return on_tensors(_combination, logits, matrices)


def _combination(logits: Tensor, matrices: Tensor) -> Tensor:
    weights = torch.softmax(logits, -1)
    return (weights @ matrices.to(weights.dtype).flatten(1)).unflatten(-1, matrices.shape[1:])


def _moving(n: int) -> list[list[list[int]]]:
    """Return which permutations of n move j to i: ``[i][j]``, as many for each."""
    found = list(enumerate(permutations(range(n))))
    return [[[k for k, moved in found if moved[i] == j] for j in range(n)] for i in range(n)]


def _kronecker(a: Tensor, b: Tensor) -> Tensor:
    """Return the Kronecker product of the last two axes of ``a`` and ``b``."""
    blocks = a[..., :, None, :, None] * b[..., None, :, None, :]
    return blocks.flatten(-2).flatten(-3, -2)
