"""The Gumbel-sigmoid estimator: gates that are 0 or 1 going forward and smooth going back, so that E[R] has a gradient.

The relaxed Bernoulli variable of Maddison et al. ("The Concrete Distribution", ICLR 2017, appendix B) and Jang et al.
("Categorical Reparameterization with Gumbel-Softmax", ICLR 2017): with u ~ U(0, 1),

    z = sigmoid((logit(p) + logit(u)) / temperature),

where logit(u) is the difference of two Gumbel variables. z >= 1/2 happens with probability p: the hard gates are drawn
exactly as BlockDrop draws its masks. Straight-through (Bengio et al. 2013; Jang et al., section 2.2): forward the hard
gate, backward dz/dp. The reward is what REINFORCE maximises (Eqn. 3), made differentiable: the probability of the true
class under the gated network and the share of open gates. Only the gradient's estimate differs: less noise, some bias,
and a pass through every block on every image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdexport.train.distributed import ALONE, World

EDGE = 1e-6  # logits of probabilities and draws stay finite


def relaxed_gates(probabilities: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """z for keep-probabilities and draws from U(0, 1) of one shape; differentiable in the probabilities."""
    return ((probabilities.logit(EDGE) + uniform.logit(EDGE)) / temperature).sigmoid()


def straight_through(relaxed: Tensor) -> Tensor:
    """1.0 where ``relaxed`` is at least 1/2 and 0.0 elsewhere, with the gradient of ``relaxed``."""
    return (relaxed >= 0.5).float() + (relaxed - relaxed.detach())


def sample_gates(
    probabilities: Tensor,
    opened: int,
    samples: int,
    temperature: float,
    generator: torch.Generator,
    world: World = ALONE,
) -> Tensor:
    """Gates float32 (S, N, K), each 0.0 or 1.0, for keep-probabilities (N, K); closed blocks are 1 without a gradient.

    ``opened``: how many of the last blocks the policy decides.
    """
    closed = probabilities.shape[1] - opened
    uniform = world.rand((samples, *probabilities.shape), generator, rows=1)
    gates = straight_through(relaxed_gates(probabilities, uniform, temperature))
    return torch.cat([torch.ones_like(gates[..., :closed]), gates[..., closed:]], dim=-1)
