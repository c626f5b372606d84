r"""Latent classes: a density of tables with real and categorical columns.

With real columns :math:`u`, in unconstrained space, and categorical ones :math:`c`,

.. math::
    p(u, c) = \sum_k w_k\, \mathcal{N}(u; \mu_k, S_k) \prod_j t_{kj}(c_j)     \tag{1}

which can have any dependence that the classes have, given classes enough. Fitted by
expectation maximisation: with the chance :math:`r_{nk}` of class :math:`k` for row
:math:`n`, and :math:`n_k = \sum_n r_{nk}`, a step is

.. math::
    w_k = \frac{n_k}{n}, \quad \mu_k = \frac{\sum_n r_{nk} u_n}{n_k}, \quad
    S_k = \frac{\sum_n r_{nk} (u_n - \mu_k)(u_n - \mu_k)^\top + \lambda I}
               {n_k + \lambda}, \quad
    t_{kj}(c) = \frac{n_{kjc} + \alpha\, m_j(c)}{n_k + \alpha}               \tag{2}

with the marginals :math:`m_j`, and columns standardised. Fits of several numbers of
classes are weighted by rows that they have not seen, and are one density of the kind.
Given some columns the others have one too, with other weights.

Missing entries are drawn, in turn with fits to the rows that are filled so.

References:
    Hunt & Jorgensen (1999), Australian & New Zealand J. Statistics 41, 154-171.
    Celeux & Diebolt (1985), Computational Statistics Quarterly 2, 73-82 (the draws).
"""

__all__ = ["LatentClasses", "latent_classes", "stacked_classes"]

import math
from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.bases.mixture import ROWS_EACH, NormalMixture
from pyro_ebm.bases.rows import Rows, split
from pyro_ebm.bases.stack import stacking_weights
from pyro_ebm.core.spaces import MixedSupport, of_columns, states_of
from pyro_ebm.core.stopwatch import Stopwatch

#: Numbers of classes that are tried, failures after which larger ones are not, and the
#: weight from which on a fit is kept.
_NUMBERS, _PATIENCE, _LEAST = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), 2, 0.02
#: The pseudo-rows of (2), steps at most, and the gain in nats a row that is too small.
_NORMAL_ROWS, _TABLE_ROWS, _STEPS, _SMALL = 0.5, 0.5, 200, 1e-5
#: Where entries are missing: fillings of the rows, in turn with fits of so many
#: classes, or fewer where each has not so many rows.
_FILLINGS, _SMALL_NUMBER, _ROWS_OF_SMALL = 10, 6, 50
#: How far apart states are in standard deviations of columns, at two starts.
_STATES_APART = (1.0, 100.0)
#: Rows that are fitted to at most, and numbers that a density holds at once.
_MAX_ROWS, _CHUNK = 20_000, 5_000_000


@final
class LatentClasses(dist.TorchDistribution):
    """The density (1) over a mixed support.

    Args:
        support: With real and categorical columns.
        probs: Weights of the classes, shape ``(K,)``.
        loc: Means of the real columns in unconstrained space, shape ``(K, R)``.
        scale_tril: Factors of their covariances, shape ``(K, R, R)``.
        log_tables: Log-probabilities of the states of each of the ``F`` categorical
            columns, shape ``(K, F, q)``; ``-inf`` beyond the states that a column has.

    Exactness: ``log_prob`` and ``sample`` are *exact*.

    Example:
        >>> real, bit = dist.constraints.real, dist.constraints.boolean
        >>> base = LatentClasses.standard(MixedSupport([real, bit]), torch.empty(0))
        >>> base.log_prob(torch.tensor([0.0, 1.0])).item()  # of 0, and of a coin
        -1.612
    """

    arg_constraints: dict[str, Constraint] = {}
    #: What it is made of, in the order of the constructor.
    PARTS = ("probs", "loc", "scale_tril", "log_tables")

    def __init__(
        self,
        support: MixedSupport,
        probs: Tensor,
        loc: Tensor,
        scale_tril: Tensor,
        log_tables: Tensor,
    ) -> None:
        self._support = support
        self.probs, self.loc, self.scale_tril = probs, loc, scale_tril
        self.log_tables = log_tables.log_softmax(-1)
        self._values = _values(support).to(loc)
        event_shape = torch.Size((len(support.columns),))
        super().__init__(torch.Size(), event_shape, validate_args=False)

    @classmethod
    def standard(cls, support: MixedSupport, like: Tensor) -> "LatentClasses":
        """Standard normal in unconstrained space, and uniform states.

        Args:
            support: With real and categorical columns.
            like: Of the dtype and on the device that it is to have.
        """
        loc = like.new_zeros(1, len(support.real))
        eye = torch.eye(len(support.real)).to(like)[None]
        values = _values(support).to(like)
        tables = torch.zeros_like(values).masked_fill(values.isnan(), -torch.inf)
        return cls(support, like.new_ones(1), loc, eye, tables[None])

    @property
    def support(self) -> MixedSupport:
        """The mixed support."""
        return self._support

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "LatentClasses":
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        vars(new).update(vars(self))
        new._batch_shape = torch.Size(batch_shape)
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, shape ``(*sample, *batch, *event)``."""
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        probs = self.probs.detach()
        chosen = torch.multinomial(probs, shape.numel(), replacement=True)
        u = self.loc.new_empty(len(chosen), len(self.support.columns))
        normal = torch.randn(len(chosen), self.loc.shape[1], 1).to(self.loc)
        real = self.loc[chosen] + (self.scale_tril[chosen] @ normal)[..., 0]
        u[:, list(self.support.real)] = real.detach()
        u[:, list(self.support.finite)] = self._states_of(chosen)
        x: Tensor = self.support.bijection()(u)
        return x.reshape(*shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (1) in nats, shape ``(*sample, *batch)``; ``-inf`` outside."""
        rows = value.reshape(-1, *self.event_shape)
        size = max(1, _CHUNK // (len(self.probs) * rows.shape[1]))
        parts = [self._log_prob(part) for part in rows.split(size)]
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return torch.cat(parts).reshape(value.shape[:-1]).expand(shape)

    def _log_prob(self, x: Tensor) -> Tensor:
        inside = self.support.check(x)
        ends = torch.where(self.support.check_columns(x), x, self._inside)
        transform = self.support.bijection()
        u = transform.inv(ends)
        volume = transform.log_abs_det_jacobian(u, ends).reshape(len(x), -1).sum(-1)
        at_classes = self.at_real(u[:, list(self.support.real)])
        at_classes = at_classes + self.at_states(x[:, list(self.support.finite)])
        found = (self.probs.log() + at_classes).logsumexp(-1) - volume  # (1)
        return found.where(inside, -torch.inf)

    @property
    def _inside(self) -> Tensor:
        """Some point of the support."""
        inside: Tensor = self.support.bijection()(self.support.two_points(self.loc))
        return inside[0]

    def at_real(self, u: Tensor) -> Tensor:
        """Log-density of real columns in each class, ``(N, R)`` to ``(N, K)``."""
        return _normal_log_prob(u, self.loc, self.scale_tril)

    def at_states(self, c: Tensor, columns: Sequence[int] | None = None) -> Tensor:
        """Log-probability of states in each class, ``(N, F)`` to ``(N, K)``.

        Args:
            c: Of the categorical columns.
            columns: Which of them; default: all.
        """
        chosen = torch.arange(self.log_tables.shape[1]).to(c.device)
        chosen = chosen if columns is None else chosen[list(columns)]
        index = (c[..., None] == self._values[chosen]).long().argmax(-1)
        return self.log_tables[:, chosen, index].sum(-1).mT

    def given(self, fixed: Tensor, value: Tensor) -> dist.TorchDistribution | None:
        """The distribution of the other columns, in their order.

        Args:
            fixed: Numbers of the columns that are known, shape ``(V,)``.
            value: What they are, shape ``(V,)``.

        Returns:
            Over vectors; of the same kind, or of real columns alone a mixture of
            normals; ``None`` where only categorical columns are left.
        """
        known = dict(zip(fixed.tolist(), value.to(self.loc), strict=True))
        real = [n for n in self.support.real if n not in known]
        if not real:
            return None
        finite = [n for n in self.support.finite if n not in known]
        row = self._inside.clone()
        row[list(known)] = torch.stack(list(known.values()))
        seen = torch.tensor([n in known for n in range(len(row))])
        log_probs, locs, scale_tril = self._classes_given(row[None], seen)
        probs, loc = log_probs[0].softmax(-1), locs[:, 0]
        free = self.support.at(sorted(real + finite))
        if isinstance(free, MixedSupport):
            left = [i for i, n in enumerate(self.support.finite) if n not in known]
            tables = self.log_tables[:, left]
            return LatentClasses(free, probs, loc, scale_tril, tables)
        mixture = NormalMixture(probs, loc, scale_tril)
        columns = {self.support.columns[n] for n in real}
        where = None if columns == {constraints.real} else free
        return Rows.like(mixture, torch.Size((len(real),)), where).distribution(mixture)

    @torch.no_grad()
    def filled(self, x: Tensor, missing: Tensor, number: int) -> Tensor:
        """Rows whose missing entries are drawn given the others, which stay.

        Args:
            x: Shape ``(N, D)``; what stands at missing entries does not matter.
            missing: Which are, shape ``(N, D)``.
            number: Of draws of each row.

        Returns:
            Shape ``(number, N, D)``.

        Exactness: *exact* draws of the conditional.
        """
        draws = torch.where(missing, self._inside, x.to(self.loc))
        draws = draws.expand(number, *x.shape).clone()
        patterns, of_row = missing.unique(dim=0, return_inverse=True)
        for index, pattern in enumerate(patterns):
            rows = (of_row == index).nonzero()[:, 0]
            new = self._drawn(draws[0, rows], ~pattern, number)
            draws[:, rows] = torch.where(pattern, new, draws[:, rows])
        return draws.to(x)

    def _drawn(self, x: Tensor, seen: Tensor, number: int) -> Tensor:
        """Rows of one pattern with what is not seen drawn, (number, n, D)."""
        log_probs, loc, scale_tril = self._classes_given(x, seen)
        probs = log_probs.softmax(-1)
        which = torch.multinomial(probs, number, replacement=True).mT  # (number, n)
        real = [n for n in self.support.real if not seen[n]]
        u = self.support.bijection().inv(x).expand(number, *x.shape).clone()
        noise = torch.randn(*which.shape, len(real), 1).to(loc)
        rows = torch.arange(len(x), device=x.device)
        u[..., real] = loc[which, rows] + (scale_tril[which] @ noise)[..., 0]
        u[..., list(self.support.finite)] = self._states_of(which)
        drawn: Tensor = self.support.bijection()(u)
        return drawn

    def _states_of(self, which: Tensor) -> Tensor:
        """States drawn of the tables of classes, shape ``(*which, F)``."""
        tables = self.log_tables.detach()[which]
        noise = torch.rand_like(tables).clamp(min=1e-30)
        # The largest of logits with Gumbel noise is a draw.
        index = (tables - (-noise.log()).log()).argmax(-1)
        columns = torch.arange(len(self._values), device=which.device)
        return self._values[columns, index]

    def _classes_given(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights of classes ``(n, K)``, and normals of what is not seen.

        Args:
            x: Rows within the support, shape ``(n, D)``.
            seen: Which columns count, shape ``(D,)``.

        Returns:
            The weights; means ``(K, n, U)`` and factors ``(K, U, U)`` of the ``U`` real
            columns that are not seen.
        """
        log_probs = self.probs.log().expand(len(x), -1)
        states = [i for i, n in enumerate(self.support.finite) if seen[n]]
        if states:
            columns = [self.support.finite[i] for i in states]
            log_probs = log_probs + self.at_states(x[:, columns], states)
        known = [i for i, n in enumerate(self.support.real) if seen[n]]
        left = [i for i, n in enumerate(self.support.real) if not seen[n]]
        loc = self.loc[:, None, left].expand(-1, len(x), -1)
        if not known:
            return log_probs, loc, self.scale_tril
        u = self.support.bijection().inv(x)[:, list(self.support.real)][:, known]
        covariance = self.scale_tril @ self.scale_tril.mT
        among = torch.linalg.cholesky(covariance[:, known][:, :, known])
        across = covariance[:, known][:, :, left]
        gain = torch.cholesky_solve(across, among)  # (K, known, left)
        loc = loc + (u - self.loc[:, None, known]) @ gain
        rest = covariance[:, left][:, :, left] - gain.mT @ across
        log_probs = log_probs + _normal_log_prob(u, self.loc[:, known], among)
        return log_probs, loc, torch.linalg.cholesky(rest)


def latent_classes(
    data: Tensor,
    num_classes: int | None = None,
    *,
    support: Constraint,
    weights: Tensor | None = None,
    held_out: Tensor | None = None,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> LatentClasses:
    """Fit the density (1) to a table with real and categorical columns.

    Args:
        data: Shape ``(N, D)``, floating-point, the states as numbers; ``nan`` is an
            entry that is missing, at random given the others of its row.
        num_classes: Default: fits of 1, 2, 3, ... 32 classes, weighted by what rows
            say that they have not seen, as one density.
        support: ``constraints.cat([...], dim=-1, lengths=[...])``, or the
            :class:`~pyro_ebm.core.MixedSupport` that an energy makes of it.
        weights: Of the rows, shape ``(N,)``; default: all equal.
        held_out: Rows to weigh by; default: about a seventh of ``data``, and what they
            like is then fitted once more, to all rows.
        max_seconds: After which no larger number is tried.
        seed: Of the held-out rows, and of the first classes.

    Returns:
        A normalised Pyro distribution over the rows.

    Raises:
        TypeError: If ``data`` is no floating-point tensor.
        ValueError: If the support is not mixed, a row is outside of it, there are fewer
            than two, or ``num_classes`` is not from 1 to their number.

    Exactness: a *local maximum* of the likelihood, but for the pseudo-rows of (2).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> label = torch.bernoulli(torch.full((600, 1), 0.5))
        >>> data = torch.cat([torch.randn(600, 2) + 6 * label, label], 1)
        >>> real, bit = dist.constraints.real, dist.constraints.boolean
        >>> support = dist.constraints.cat([real, bit], dim=-1, lengths=[2, 1])
        >>> base = latent_classes(data, 2, support=support)
        >>> base.probs.round(decimals=1), base.sample((5,)).shape
        (tensor([0.5, 0.5]), torch.Size([5, 3]))
    """
    where, missing = of_columns(support, data.shape[1:]), data.isnan()
    if not isinstance(where, MixedSupport):
        raise ValueError(
            "support must have real and categorical columns, as constraints.cat("
            f"[...], dim=-1, lengths=[...]) and a MixedSupport do; got {support}."
        )
    data, number = _completed(data, missing, where, weights, seed), len(data)
    if weights is not None and not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(
            "weights must be finite and not negative, got "
            f"{weights.min().item()} to {weights.max().item()}."
        )
    is_whole = num_classes is None or num_classes == int(num_classes)
    if num_classes is not None and not (is_whole and 1 <= num_classes <= number):
        raise ValueError(
            f"num_classes must be from 1 to the number of rows, {number}; got "
            f"{num_classes}."
        )
    if num_classes is not None:
        return _Table(data, where, weights).fitted(int(num_classes), seed)
    settings = weights, held_out, max_seconds, seed
    found, _ = stacked_classes(data, where, *settings)
    if bool(missing.any()):
        data = found.filled(data, missing, 1)[0]
        found, _ = stacked_classes(data, where, *settings)
    return found


@torch.no_grad()
def stacked_classes(
    data: Tensor,
    support: MixedSupport,
    weights: Tensor | None,
    held_out: Tensor | None,
    max_seconds: float,
    seed: int,
) -> tuple[LatentClasses, Tensor]:
    """Fits of several numbers of classes as one, weighted by rows they have not seen.

    Args:
        data: As for :func:`latent_classes`, like the others.
        support: Of the rows.
        weights: Of the rows.
        held_out: Rows to weigh by.
        max_seconds: That it may take.
        seed: Of rows and classes.

    Returns:
        The density, and log-densities of held-out rows by fits to the others.
    """
    train, shares = _checked(data, support), weights
    if held_out is None:
        train, apart = split(data, seed)
        shares = None if weights is None else split(weights, seed)[0]
    else:
        apart = _checked(held_out, support)
    table = _Table(train, support, shares)
    fits, at_rows = _tried(table, apart, max_seconds, seed)
    chances = stacking_weights(at_rows)
    kept = (chances >= _LEAST).nonzero()[:, 0]
    chances = chances[kept] / chances[kept].sum()
    scores = (at_rows[kept] + chances.log()[:, None]).logsumexp(0)
    parts = [fits[index] for index in kept.tolist()]
    if held_out is None:
        table = _Table(data, support, weights)
        parts = [table.fitted(len(part.probs), seed) for part in parts]
    pairs = zip(parts, chances, strict=True)
    probs = torch.cat([part.probs * chance.to(part.probs) for part, chance in pairs])
    rest = [
        torch.cat([getattr(part, name) for part in parts])
        for name in LatentClasses.PARTS[1:]
    ]
    return LatentClasses(support, probs, *rest), scores


def _checked(data: Tensor, support: MixedSupport) -> Tensor:
    Rows.of(data[..., list(support.real)], None)  # which checks type and number
    inside = support.check(data)
    if not inside.all():
        raise ValueError(
            f"data must lie in the support {support}; {int((~inside).sum())} of "
            f"{len(data)} rows do not, the first is {data[~inside][0].tolist()}."
        )
    return data


def _completed(
    data: Tensor,
    missing: Tensor,
    support: MixedSupport,
    weights: Tensor | None,
    seed: int,
) -> Tensor:
    """Rows whose missing entries are drawn, in turn with fits to the filled rows."""
    if not missing.any():
        return _checked(data, support)
    empty = missing.all(0).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"data has no entry at all in column(s) {empty}. Leave it out."
        )
    filled = data.clone()
    for column in range(data.shape[1]):
        gone = missing[:, column]
        known = data[~gone, column]
        filled[gone, column] = known[torch.randint(len(known), (int(gone.sum()),))]
    _checked(filled, support)
    number = max(1, min(_SMALL_NUMBER, len(data) // _ROWS_OF_SMALL))
    for _ in range(_FILLINGS):
        found = _Table(filled, support, weights).fitted(number, seed)
        filled = found.filled(filled, missing, 1)[0]
    return filled


def _tried(
    table: "_Table", apart: Tensor, max_seconds: float, seed: int
) -> tuple[list[LatentClasses], Tensor]:
    """Fits of 1, 2, 3, ... classes, and their log-densities of other rows, (K, M)."""
    watch, fits, values = Stopwatch(), [], []
    for number in _NUMBERS:
        is_late = watch.seconds > max_seconds
        if number > 1 and (is_late or number * ROWS_EACH > len(table.z)):
            break
        base = table.fitted(number, seed)
        fits.append(base)
        values.append(base.log_prob(apart))
        means = torch.stack(values).mean(1)
        if len(values) > int(means.argmax()) + _PATIENCE:
            break
    return fits, torch.stack(values)


class _Table:
    """Rows in the form that expectation maximisation takes.

    Args:
        data: Shape ``(N, D)``, within the support.
        support: Mixed.
        weights: Of the rows, or ``None``.
    """

    def __init__(
        self, data: Tensor, support: MixedSupport, weights: Tensor | None
    ) -> None:
        self.support, self.like = support, data[:0, 0]
        data = data.detach()[:_MAX_ROWS].double()
        self.weights = torch.ones_like(data[:, 0])
        if weights is not None:
            self.weights = weights[:_MAX_ROWS].to(data)
        u = support.bijection().inv(data)[:, list(support.real)]
        share = self.weights / self.weights.sum()
        self.loc = share @ u
        scale = (share @ (u - self.loc).square()).sqrt()
        self.scale = scale.where(scale > 0, 1.0)
        self.z = (u - self.loc) / self.scale
        values = _values(support).to(data)
        self.is_state = ~values.isnan()
        self.states = (data[:, list(support.finite), None] == values).to(
            data
        )  # (N, F, q)
        counts = torch.einsum("n,nfq->fq", self.weights, self.states) + 0.5
        counts = counts * self.is_state
        self.marginals = counts / counts.sum(-1, keepdim=True)

    @torch.no_grad()
    def fitted(self, number: int, seed: int) -> LatentClasses:
        """The density (1) with so many classes, the better one of two starts."""
        starts = [self._first(number, seed, each) for each in _STATES_APART]
        runs = [self._run(r) for r in (starts if number > 1 else starts[:1])]
        probs, loc, scale_tril, tables = max(runs, key=lambda run: run[0])[1]
        return LatentClasses(
            self.support,
            probs.to(self.like),
            (self.loc + self.scale * loc).to(self.like),
            (self.scale[:, None] * scale_tril).to(self.like),
            tables.log().to(self.like),
        )

    def _run(self, r: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        """Nats a row in the end, and the parts of (1)."""
        value = -math.inf
        for _ in range(_STEPS):
            parts = self._step(r)
            at_classes = self._at_classes(*parts)
            total = at_classes.logsumexp(-1, keepdim=True)
            r = (at_classes - total).exp() * self.weights[:, None]
            last, value = value, float(self.weights @ total[:, 0] / self.weights.sum())
            if value - last < _SMALL:
                break
        return value, parts

    def _first(self, number: int, seed: int, apart: float) -> Tensor:
        """Each row in the class of the nearest of rows that are far apart."""
        generator = torch.Generator().manual_seed(seed)
        features = torch.cat([self.z, apart * self.states.flatten(1)], 1)
        chance = self.weights.clone()
        centres = []
        for _ in range(number):
            chosen = torch.multinomial(chance.cpu(), 1, generator=generator)
            centres.append(features[chosen.to(features.device)])
            far = torch.cdist(features, torch.cat(centres)).amin(1).square()
            chance = self.weights * far
            chance = chance if chance.sum() > 0 else self.weights
        nearest = torch.cdist(features, torch.cat(centres)).argmin(1)
        r = torch.nn.functional.one_hot(nearest, number).to(features)
        return (0.9 * r + 0.1 / number) * self.weights[:, None]

    def _step(self, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What chances of the classes give, by (2)."""
        count = r.sum(0)
        loc = r.mT @ self.z / count.clamp(min=1e-12)[:, None]
        size = self.z.shape[1]
        eye = torch.eye(size).to(r)
        scatter = torch.stack(
            [
                (self.z - mean).mT @ (chance[:, None] * (self.z - mean))
                for mean, chance in zip(loc, r.mT, strict=True)
            ]
        )
        # Pseudo-rows as wide as a class is, if all are equally far apart.
        prior = _NORMAL_ROWS * len(count) ** (-2 / size) * eye
        covariance = (scatter + prior) / (count + _NORMAL_ROWS)[:, None, None]
        tables = torch.einsum("nk,nfq->kfq", r, self.states)
        tables = tables + _TABLE_ROWS * self.marginals
        tables = tables / tables.sum(-1, keepdim=True)
        probs = (count + 1e-6) / (count + 1e-6).sum()
        return probs, loc, torch.linalg.cholesky(covariance), tables  # (2)

    def _at_classes(
        self, probs: Tensor, loc: Tensor, scale_tril: Tensor, tables: Tensor
    ) -> Tensor:
        """Log-density of each row and class, shape ``(N, K)``."""
        log_tables = tables.log().masked_fill(~self.is_state, 0.0)
        at_states = self.states.flatten(1) @ log_tables.flatten(1).mT
        return probs.log() + _normal_log_prob(self.z, loc, scale_tril) + at_states


def _values(support: MixedSupport) -> Tensor:
    """States of each categorical column, shape ``(F, q)``, ``nan`` beyond its own."""
    rows = [states_of(support.columns[n]).double() for n in support.finite]
    width = max(map(len, rows))
    return torch.stack(
        [
            torch.nn.functional.pad(row, (0, width - len(row)), value=torch.nan)
            for row in rows
        ]
    )


def _normal_log_prob(u: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Of rows ``(N, R)`` in ``K`` normals, shape ``(N, K)``."""
    apart = (u - loc[:, None]).mT  # (K, R, N)
    white = torch.linalg.solve_triangular(scale_tril, apart.to(scale_tril), upper=False)
    log_volume = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = loc.shape[1] / 2 * math.log(2 * math.pi) + log_volume
    return -(white.square().sum(1) / 2 + constant[:, None]).mT
