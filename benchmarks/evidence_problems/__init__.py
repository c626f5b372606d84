r"""Evidence problems: models whose :math:`\log Z` is known.

An estimator of :math:`\log Z` is judged by how often its interval holds the truth on
models that nobody tuned it for. :func:`problems` has inputs that were hard for this
library or for others, :func:`variants` other problems of the same kinds: other
dimensions, weights, widths, priors and data. Both map a name to a function of the
dtype that builds an :class:`EvidenceProblem`, so that only what is asked for is built;
so does ``DATA_PROBLEMS``, of those on published data.
"""

__all__ = ["DATA_PROBLEMS", "EvidenceProblem", "problems", "variants"]

from .base import EvidenceProblem
from .catalogue import problems, variants
from .published import DATA_PROBLEMS
