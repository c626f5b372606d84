r"""Evidence problems: models whose :math:`\log Z` is known.

An estimator of :math:`\log Z` is judged by how often its interval holds the truth on
models that nobody tuned it for. :func:`problems` has inputs that were hard for this
library or for others, :func:`variants` other problems of the same kinds: other
dimensions, weights, widths, priors and data. Both map a name to a function of the
dtype that builds an :class:`EvidenceProblem`, so that only what is asked for is built.

Example:
    >>> coin = problems()["coin"](torch.float64)
    >>> found = pyro_ebm.partition.estimate(coin.target, coin.base)
    >>> found.lower <= coin.truth <= found.upper
    True
"""

__all__ = ["EvidenceProblem", "problems", "variants"]

from pyro_ebm.testing.evidence_problems.base import EvidenceProblem
from pyro_ebm.testing.evidence_problems.catalogue import problems, variants
