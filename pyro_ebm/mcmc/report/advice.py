"""What to change in a model or a run whose chains have not mixed.

Nothing here decides about the verdict: each finding is a statistic of the draws that
tells one cause from the others, and is looked for only where a run is not ok.
"""

__all__ = ["advise"]

import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.mcmc.report.results import Diagnostics
from pyro_ebm.mcmc.report.summary import coordinate_names

#: Draws of all chains together that are looked at.
_MAX_DRAWS = 8192
#: Draws of a group below which nothing can be told.
_MIN_DRAWS = 10
#: Coordinates beyond which correlations are not looked at, as the table has D**2.
_MAX_COORDINATES = 512
#: Groups whose mean energy is so many standard deviations above the median one's.
_FAR = 4.0
#: Gap between groups, in standard deviations within them, that makes two places.
_GAP = 4.0
#: Posterior correlation that a diagonal metric cannot undo.
_COLLINEAR = 0.99
#: Correlation of log scale and log spread above which the data hardly tell them apart.
_FUNNEL = 0.7


@torch.no_grad()
def advise(
    samples: dict[str, Tensor], energy: Tensor, found: Diagnostics
) -> list[Finding]:
    """Causes that the draws show.

    Args:
        samples: Of each site, shape ``(C, N, *site)``.
        energy: Shape ``(C, N)``.
        found: Of a run that is not ok.
    """
    step = max(-(-energy.numel() // _MAX_DRAWS), 1)
    late = slice(energy.shape[1] // 2, None, step)  # the later half of each chain
    energy = _by_group(energy[:, late].double(), found)
    if energy.shape[1] < _MIN_DRAWS or not energy.isfinite().all():
        return []
    names = [n for k, v in samples.items() for n in coordinate_names(k, v.shape[2:])]
    columns = [v[:, late, ..., None].double().flatten(2) for v in samples.values()]
    values = _by_group(torch.cat(columns, -1), found)
    if not values.isfinite().all():
        return []
    is_far = _is_far(energy)
    arrived = values[~is_far]
    findings = []
    if is_far.any():
        findings.append(_not_arrived(energy, is_far, found))
    else:
        findings += _separate(values, names, found)
    if not findings:
        findings += _collinear(arrived, names)
        sites = dict(
            zip(samples, arrived.split([v.shape[-1] for v in columns], -1), strict=True)
        )
        findings += _funnels(sites, found)
    return findings


def _by_group(values: Tensor, found: Diagnostics) -> Tensor:
    """``(C, N, ...)`` as ``(G, C / G * N, ...)``."""
    return values.unflatten(0, (found.num_superchains, -1)).flatten(1, 2)


def _is_far(energy: Tensor) -> Tensor:
    """Groups that lie far above the others, shape ``(G,)``."""
    mean, sd = energy.mean(1), energy.std(1)
    return mean > mean.median() + _FAR * sd.median()


def _not_arrived(energy: Tensor, is_far: Tensor, found: Diagnostics) -> Finding:
    mean = energy.mean(1)
    above = (mean[is_far].min() - mean.median()).item()
    return Finding(
        Reason.CHAINS_BEHIND,
        f"{int(is_far.sum())} of {_groups(found)} did not arrive where the others are, "
        f"{above:.3g} nats and more below in energy: give more warmup_steps, or "
        "initial points nearer to the bulk",
    )


def _groups(found: Diagnostics) -> str:
    kind = " groups of chains" if found.is_nested else " chains"
    return f"{found.num_superchains:,}{kind}"


def _separate(values: Tensor, names: list[str], found: Diagnostics) -> list[Finding]:
    """Groups in places that they do not leave, by the coordinate that shows it best."""
    mean, order = values.mean(1).sort(0)
    sd = values.std(1).gather(0, order)
    gaps = mean.diff(dim=0) / torch.maximum(sd[1:], sd[:-1])
    if not len(gaps):
        return []
    gaps = gaps.nan_to_num(0.0)
    worst = int(gaps.amax(0).argmax())
    cuts = (gaps[:, worst] > _GAP).nonzero().squeeze(-1) + 1
    # As many places as groups are chains that hardly move, no modes.
    if not len(cuts) or len(cuts) + 1 > len(mean) / 2:
        return []
    parts = mean[:, worst].tensor_split(cuts.cpu())
    places = " and ".join(f"{part.mean().item():.3g}" for part in parts)
    return [
        Finding(
            Reason.SEPARATE_MODES,
            f"the {_groups(found)} are in {len(parts)} places that they do not leave, "
            f"{names[worst]} around {places}: for separate modes take "
            "mcmc.ReplicaExchange",
        )
    ]


def _collinear(values: Tensor, names: list[str]) -> list[Finding]:
    if values.shape[-1] > _MAX_COORDINATES:
        return []
    centred = (values - values.mean(1, keepdim=True)).flatten(0, 1)
    correlation = torch.corrcoef(centred.mT).reshape(len(names), -1).nan_to_num(0.0)
    # What is 1 up to rounding is one coordinate twice, as in a symmetric matrix.
    size = correlation.tril(-1).abs()
    size[size > 1 - 1e-9] = 0.0
    largest = int(size.argmax())
    first, second = divmod(largest, len(names))
    if size.flatten()[largest] <= _COLLINEAR:
        return []
    value = correlation[first, second].item()
    return [
        Finding(
            Reason.COLLINEAR,
            f"{names[second]} and {names[first]} correlate at {value:.4f}: center what "
            "multiplies one of them, as x - x.mean() of a slope and an intercept",
        )
    ]


def _funnels(sites: dict[str, Tensor], found: Diagnostics) -> list[Finding]:
    """Positive coordinates that the spread of another site follows."""
    findings = []
    for scale, values in sites.items():
        if not (values > 0).all():
            continue
        for site, others in sites.items():
            is_done = site in found.non_centred
            if is_done or site == scale or others.shape[-1] < 3:
                continue
            pair = [values.log(), others.std(-1, keepdim=True).log()]
            rows = torch.cat([v - v.mean(1, keepdim=True) for v in pair], -1)
            table = torch.corrcoef(rows.flatten(0, 1).mT).nan_to_num(0.0)
            best = int(table[-1, :-1].argmax())
            if table[-1, best] > _FUNNEL:
                name = list(coordinate_names(scale, found.sites[scale].r_hat.shape))
                findings.append(
                    Finding(
                        Reason.FUNNEL,
                        f"the spread of {site!r} follows {name[best]} (their "
                        f"logarithms correlate at {table[-1, best].item():.2f}), a "
                        f"funnel: try a non-centred form, {site} = location + "
                        f"{name[best]} * z, by pyro.infer.reparam.LocScaleReparam",
                    )
                )
    return findings
