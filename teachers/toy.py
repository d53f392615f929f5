"""What each access to a teacher is worth, where its probabilities are known.

python train.py experiment=toy

The teacher is t_i ~ 1/i over V tokens, the same at each of R positions. For each access: what a
student that fits its targets perfectly would say, and how much a target varies from draw to draw,
by the very function that training uses.
"""

import torch
from rich.console import Console
from rich.table import Table

from teachers.access import ACCESS_KINDS, to_sparse_targets
from teachers.rows import CacheSpec

V = 100_000  # vocabulary
K = 20  # top entries
N = 12  # draws
R = 20_000  # positions

SHOWN = (  # access, tail, what a perfect student is
    ("greedy", "", "biased: all on one token"),
    ("text", "", "unbiased"),
    ("sampled", "", "unbiased"),
    ("topk", "ghost", "head and tail's mass exact, its shape free"),
    ("topk", "smooth", "head and tail's mass exact, its shape flat"),
    ("topk", "truncate", "biased: no tail, the head 1/M too high"),
    ("topk", "renormalize", "biased: no tail, the head 1/M too high"),
    ("topk", "renormalize_both", "only ratios inside the top k; the rest is not identified"),
    ("residual_to_label", "", "biased: the head 2-M too high, the tail 1-M too low"),
    ("unbiased", "", "unbiased"),
    ("stratified", "", "unbiased, the least variance a byte"),
    ("full", "", "exact"),
)


def zipf() -> torch.Tensor:
    """[V] probabilities, the likeliest first."""
    weights = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    return weights / weights.sum()


def draw_targets(kind: str, t: torch.Tensor, generator: torch.Generator):
    """The (ids, log_weights) [R,slots] that training would see; one position where they are all t.

    t: [V] the teacher's probabilities
    """
    stored = ACCESS_KINDS[kind].stored
    num_positions = R
    num_entries = K
    if "all" in stored:
        num_positions = 1
        num_entries = V
    elif "token" in stored:
        num_entries = 1
    ids = torch.arange(num_entries).expand(num_positions, -1)  # [R,K]
    log_probs = t[ids].log().float()  # [R,K]

    def draw(probs: torch.Tensor, count: int) -> torch.Tensor:
        return torch.multinomial(probs, count, replacement=True, generator=generator)

    labels = draw(t, num_positions)  # [R]
    num_draws = N if ACCESS_KINDS[kind].n else 1
    draws = None  # [R,N]
    if "draws" in stored:
        draws = draw(t, R * num_draws).view(R, -1)
    elif "tail_draws" in stored:
        draws = draw(t[K:], R * num_draws).view(R, -1) + K
    return to_sparse_targets(kind, ids, log_probs, draws, labels)


def measure(kind: str, t: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """The mean target [V], and its variance at one position, summed over tokens."""
    ids, log_weights = draw_targets(kind, t, generator)
    weights = log_weights.double().exp()  # [R,slots]
    weights = weights.masked_fill(ids < 0, 0)
    tokens = ids.clamp(min=0).long()
    num_positions = len(ids)

    mean = torch.zeros(V, dtype=torch.float64)
    mean.index_add_(0, tokens.flatten(), weights.flatten() / num_positions)

    # A token that was drawn twice at a position adds up there.
    positions = torch.arange(num_positions)[:, None]
    _, slots = (positions * V + tokens).unique(return_inverse=True)
    summed = torch.zeros_like(weights).flatten()
    summed.index_add_(0, slots.flatten(), weights.flatten())
    variance = summed.square().sum() / num_positions - mean.square().sum()
    return mean, max(0.0, variance.item())


def rows(t: torch.Tensor) -> list[tuple]:
    """For each of SHOWN: access, tail, the perfect student's p_1, p_2 and mass off the top K,
    the variance, bytes a token, and the note."""
    generator = torch.Generator().manual_seed(0)
    measured = {}
    for kind in ACCESS_KINDS:
        measured[kind] = measure(kind, t, generator)
    table = []
    for kind, tail, note in SHOWN:
        mean, variance = measured[kind]
        p = mean / mean.sum()
        if tail in ("ghost", "smooth"):
            p = t
        elif tail == "renormalize_both":
            p = torch.full_like(t, torch.nan)
        student = [p[0].item(), p[1].item(), 1 - p[:K].sum().item()]
        spec = CacheSpec(kind, V, 1, {"train": 1}, "", "", "", K, N)
        table.append((kind, tail, *student, variance, spec.row.itemsize, note))
    return table


def show() -> None:
    """Prints the table."""
    t = zipf()
    truth = f"p_1 = {t[0]:.4f}, p_2 = {t[1]:.4f}, off the top k {1 - t[:K].sum():.4f}"
    title = f"A teacher with t_i ~ 1/i, V={V:,}, k={K}, n={N}: {truth}; {R:,} positions"
    table = Table("access", "tail", title=title, title_justify="left")
    for name in ("p_1", "p_2", "off top k", "variance", "bytes a token"):
        table.add_column(name, justify="right")
    table.add_column("a perfect student is")
    for kind, tail, *values, size, note in rows(t):
        cells = [f"{value:.4f}".replace("nan", "") for value in values]
        table.add_row(kind, tail, *cells, f"{size:,}", note)
    Console(width=150).print(table)
