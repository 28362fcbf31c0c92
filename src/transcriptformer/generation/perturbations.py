"""In-silico perturbations: knock-outs of genes, and changes of their counts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.errors import UsageError
from transcriptformer.generation.gene_names import distinct_tokens
from transcriptformer.generation.prompts import make_prompts

REMOVED = 0
"""Count that stands for a gene that is knocked out."""

ADDED_AT = ("end", "start")
"""Where a gene is added to a cell that does not express it."""


class Perturbation(NamedTuple):
    """A change of one gene.

    Attributes
    ----------
    name
        Description, with the gene as the user named it.
    token
        Token of the gene.
    new_count
        Its clipped count afterwards, or `REMOVED`.
    """

    name: str
    token: int
    new_count: float


def make_perturbations(
    checkpoint: Checkpoint, knock_out: Sequence[str], set_counts: Sequence[tuple[str, float]] | Mapping[str, float]
) -> list[Perturbation]:
    """Return the knock-outs of genes, and then the changes of counts, one of each gene.

    Raises
    ------
    UsageError
        If there is none, a gene is unknown or occurs twice, a count is not a whole number of at least 1, or a count is
        set and the checkpoint was trained on scaled counts.
    """
    pairs = list(set_counts.items()) if isinstance(set_counts, Mapping) else list(set_counts)
    if not knock_out and not pairs:
        raise UsageError("nothing to perturb: give --knock-out, --knock-out-each or --set")
    made = list[Perturbation]()
    if knock_out:
        tokens = distinct_tokens(knock_out, checkpoint, "--knock-out")
        made = [Perturbation(f"knock-out {gene}", int(t), REMOVED) for gene, t in zip(knock_out, tokens, strict=True)]
    if pairs:
        distinct_tokens([gene for gene, _ in pairs], checkpoint, "--set")
        prompts = make_prompts([[pair] for pair in pairs], checkpoint, "--set")
        made += [
            Perturbation(f"{gene}={count:g}", int(prompt.tokens[0]), float(prompt.counts[0]))
            for (gene, count), prompt in zip(pairs, prompts, strict=True)
        ]
    return made
