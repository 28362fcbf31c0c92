"""`transcriptformer embed-proteins`: the protein embeddings of a species."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from transcriptformer.cli.options import PRECISION, PRECISIONS, Debug, Device, MaxRetries, NumGpus, Resume, option

if TYPE_CHECKING:
    from transcriptformer.proteins.embed import Similarities, Summary


def embed_proteins(
    fasta: Annotated[Path | None, option("FASTA file of proteins, plain or gzipped.", metavar="FILE")] = None,
    organism_key: Annotated[
        str | None, option("Fetch the proteins from Ensembl, such as homo_sapiens.", metavar="NAME")
    ] = None,
    output_dir: Annotated[
        Path, option("Output folder of <species>_gene.h5.", metavar="DIR", default="protein_embedding_results")
    ] = Path("protein_embedding_results"),
    model: Annotated[
        str,
        option("ESM-2: Hugging Face name or local folder.", metavar="NAME|DIR", default="facebook/esm2_t36_3B_UR50D"),
    ] = "facebook/esm2_t36_3B_UR50D",
    layer: Annotated[
        int | None,
        option("Layer of the embeddings, from 1.", metavar="INT", default="33 of 36, as published; else the last"),
    ] = None,
    id_from: Annotated[
        str,
        option("Header field or regular expression of the gene id.", metavar="gene|gene_symbol|REGEX", default="gene"),
    ] = "gene",
    isoforms: Annotated[
        str, option("Isoforms that represent a gene.", metavar="first|longest|mean", default="first")
    ] = "first",
    max_length: Annotated[
        int, option("Truncate proteins to this many residues.", metavar="INT", default=1022, min=1)
    ] = 1022,
    tokens_per_batch: Annotated[
        int | None,
        option("Maximum tokens per batch.", metavar="INT", default="16384 on a GPU, 4096 on a CPU", min=1),
    ] = None,
    device: Device = None,
    precision: Annotated[str, option(PRECISION, metavar=PRECISIONS, default="32")] = "32",
    num_gpus: NumGpus = None,
    resume: Resume = False,
    compare: Annotated[Path | None, option("Protein embeddings to compare the result with.", metavar="FILE")] = None,
    max_retries: MaxRetries = 5,
    debug: Debug = False,
) -> None:
    """Compute the protein embeddings of a species with ESM-2.

    The result is for inference --pretrained-embedding.
    """
    from transcriptformer.cli.reporting import CountProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable("--resume"):
        from transcriptformer.errors import UsageError

        if (fasta is None) == (organism_key is None):
            raise UsageError("give either --fasta or --organism-key")

        from transcriptformer.checkpoint.vocabs import read_gene_ids
        from transcriptformer.proteins import embed

        settings = embed.Settings(
            model=model,
            layer=layer,
            id_from=id_from,
            isoforms=isoforms,
            max_length=max_length,
            tokens_per_batch=tokens_per_batch,
            device=device or "auto",
            precision=precision,
            num_gpus=1 if num_gpus is None else num_gpus,
            resume=resume,
        )
        if compare is not None:
            read_gene_ids(compare)  # before hours of work
        if organism_key is not None:
            output = output_dir / f"{organism_key}_gene.h5"
            fasta = _fetch(organism_key, output_dir, max_retries)
        else:
            assert fasta is not None
            output = embed.result_path(fasta, output_dir)
        with CountProgress("proteins") as progress:
            summary = embed.embed_proteins(fasta, output, settings, progress.update)
        say(f"{output}: {_describe(summary, max_length)}")
        if compare is not None:
            say(f"{compare}: {_describe_similarities(embed.compare(output, compare))}")


def _fetch(organism_key: str, folder: Path, max_retries: int) -> Path:
    from transcriptformer.cli.reporting import ByteProgress, resumable
    from transcriptformer.fetching.fetcher import Fetcher
    from transcriptformer.proteins.ensembl import fasta_source, fetch_fasta

    source = fasta_source(organism_key)
    with resumable(), ByteProgress() as progress:
        fetcher = Fetcher(max_retries, advance=progress.advance, resumed=progress.resumed)
        return fetch_fasta(source, folder, fetcher, progress.expect)


def _describe(summary: "Summary", max_length: int) -> str:
    return (
        f"{summary.n_genes:,} genes, width {summary.width:,}, from {summary.n_proteins:,} proteins "
        f"({summary.n_sequences:,} different sequences); {summary.n_cut:,} truncated to {max_length:,} residues, "
        f"{summary.n_replaced:,} letters replaced by <unk>; {summary.n_computed:,} sequences computed in "
        f"{summary.seconds:.1f} s ({summary.n_computed / summary.seconds:.1f} per second)"
    )


def _describe_similarities(found: "Similarities") -> str:
    return (
        f"{found.n_shared:,} genes in common; cosine similarities: minimum {found.minimum:.6f}, "
        f"median {found.median:.6f}, mean {found.mean:.6f}"
    )
